"""Triton kernels that multiply straight from packed 4-bit weights.

Nothing is imported here: `order`, `ptx` and `address` need torch only, the rest needs triton.
"""
