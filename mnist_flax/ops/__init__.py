"""Convolution, pooling and normalisation in forms that each platform runs fast."""
