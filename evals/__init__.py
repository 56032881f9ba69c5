"""Evals: what 4 bits cost, how fast qmix is, and the tiny Mixtral that shows both on every machine.

The commands are files here; their parts are in quality, timing, serving, routing, training and
steps. Knows nothing of the `qmix` command line.
"""
