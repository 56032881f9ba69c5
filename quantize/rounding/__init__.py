"""Rounding one matrix: NF4, round to nearest, GPTQ, the grid of a group, the second moments.

Knows nothing of models, checkpoints or files.
"""
