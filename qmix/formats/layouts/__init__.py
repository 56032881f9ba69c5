"""The 4-bit layouts that people have: one file each turns its tensors into weights and back.

Knows nothing of how files are read or written.
"""
