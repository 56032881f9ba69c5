"""Generation: the loop, its configuration, sampling, stopping, streaming, CUDA graphs.

Knows a model by what the loop asks of it (`next_logits`, `new_cache`), never its class.
"""
