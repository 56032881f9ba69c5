"""The packed (tiled) layout: 4-bit codes in the order in which the GPU kernels read them.

Knows torch, and nothing of kernels: the products with packed weights are kernels/gpu/packed_matmul.
"""
