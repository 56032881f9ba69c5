"""Which experts tokens choose: traces recorded, replayed and simulated."""
