"""What trained networks can do: predictions, scores, calibration, reports, populations and comparisons."""
