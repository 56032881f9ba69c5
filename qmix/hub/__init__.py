"""Where a checkpoint comes from: a folder, a file, a hub's cache, or the hub itself.

Knows nothing of tensors and no torch. Only `remote` and `cache` import huggingface_hub.
"""
