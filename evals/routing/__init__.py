"""Which experts tokens choose: traces that are recorded, replayed through a policy and simulated.

Knows nothing of quality. `qmix trace replay` answers without torch.
"""
