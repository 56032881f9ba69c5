"""The network's layers: attention, routed experts, the cache, the decoder, losses and outputs.

Knows no bits, no files and no tiers: weights go through qmix.kernels, experts come from a store.
"""
