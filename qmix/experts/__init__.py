"""Which experts lie where: policy, residency and heat in integers, their traces and their simulation.

An expert's id is `layer * experts_per_layer + expert`. Tensors begin with the arenas and the store.
"""
