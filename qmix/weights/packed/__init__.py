"""The packed (tiled) layout: codes in the order in which the GPU kernels read them.

Knows torch, and no kernel: the matmuls are in kernels.gpu and kernels.cpu.
"""
