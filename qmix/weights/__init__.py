"""Weights: what the bits of a stored matrix mean (`dequantize`), for every kind of weight.

Knows nothing of files, of kernels, or of how codes are chosen. Shape letters: see qmix.kernels.
"""
