"""The report of a run as an HTML page: learning curves, mistakes and calibration, with every number also as JSON."""
