"""Calibrated runs: a layer at a time on real activations, resumable, bits chosen by divergence."""
