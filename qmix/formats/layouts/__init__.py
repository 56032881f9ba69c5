"""The 4-bit layouts that checkpoints have: each turns a weight's tensors into a Weight and back.

Knows nothing of how files are read or written. Shape letters: see qmix.kernels; G here are the
groups of a weight's row, of K / G inputs each.
"""
