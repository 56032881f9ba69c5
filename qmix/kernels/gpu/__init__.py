"""Triton kernels that multiply packed 4-bit weights without unpacking them, and their launchers.

Nothing is imported here: the launchers need triton through the `*_triton` modules, and nothing else
in qmix does. Knows nothing of models.
"""
