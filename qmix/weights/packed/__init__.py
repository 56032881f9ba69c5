"""The packed (tiled) layout: 4-bit codes in the order in which the GPU kernels read them.

Knows torch, and no kernel: the matmuls are in kernels.gpu and kernels.cpu.
"""
