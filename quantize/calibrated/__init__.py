"""Calibrated runs: layer by layer on real activations, resumable, with bits chosen by divergence.

Knows nothing of how one matrix is rounded, and nothing of the text beyond its token ids.
"""
