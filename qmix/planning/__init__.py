"""What fits, what it costs and how fast it can be, before anything is loaded.

Arithmetic on shapes and measured rates: no torch, and no tensor is ever read here.
Shape letters are those of qmix.kernels; a file names only what it adds.
"""
