"""Weights: what the bits of a stored matrix mean (`dequantize`), for every kind there is.

Knows nothing of files, of kernels, or of how codes are chosen.
"""
