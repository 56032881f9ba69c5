"""How fast it is, and what the memory allows: benches, bandwidth, peers, machine code."""
