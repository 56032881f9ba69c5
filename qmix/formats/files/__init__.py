"""Files of tensors, whatever they mean: safetensors, pickles, and the directory that qmix writes.

Knows bytes, names and shapes; nothing of weights or of layouts.
"""
