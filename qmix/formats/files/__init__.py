"""Files of tensors: safetensors, pickles, shards with an index, and the directory that qmix writes.

Knows bytes, names, dtypes and shapes; nothing of weights or layouts.
"""
