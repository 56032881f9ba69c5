"""GGUF files as checkpoints: config and tensors as qmix names them.

What the bits of a quantized tensor mean is written in layouts.gguf. Knows no torch.
"""
