"""Rounding one matrix: NF4, nearest, GPTQ, the grid of a group's scales, the Hessian.

Knows nothing of models, checkpoints or files.
"""
