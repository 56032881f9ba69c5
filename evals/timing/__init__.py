"""How fast qmix is, and what the memory allows: benches, bandwidth, peers, machine code.

Knows nothing of quality.
"""
