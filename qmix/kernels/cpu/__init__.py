"""CPU kernels for 4-bit weights: C++ sources that are compiled at first use, and their callers.

Knows nothing of models, layers or caches.
"""
