"""The network's layers: attention, routed experts, the cache, the decoder, losses and outputs.

Knows no bits, no files and no tiers: weights go through qmix.kernels, experts come from a store.

Shape letters, here and in qmix.generation and qmix.models; a file names only what it adds:

    B  rows of the batch       H  query heads            V  vocabulary
    S  new positions           G  key-value heads        C  labels (classes)
    L  positions so far        d  width of a head        E  experts
    T  tokens, B * S           D  hidden width           k  experts per token
    P  columns of the prompt   n  new tokens             W  sliding window

In a pass over S new positions after a cache, L counts both: the new ones are the last S of L.
"""
