"""Evaluation of trained networks: predictions, scores, calibration, robustness, reports, populations, comparisons."""
