"""From a trained run to files that run elsewhere: ONNX, StableHLO, NumPy, the demo page."""
