"""Triton kernels that multiply straight from packed 4-bit weights, and their launchers.

Nothing is imported here: the `*_triton` modules need triton, the rest torch only.
"""
