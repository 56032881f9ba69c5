"""A layer's experts, and the stores that keep them where they fit: on a GPU, its host, the disk.

An expert's id is `layer * experts_per_layer + expert`. Policy, residency, miss path and heat file
are integers only; tensors begin with the arenas. The room knows no model, no router and no file
format. Shape letters are those of qmix.kernels.
"""
