"""Evals: what 4 bits cost, and the small Mixtral that shows it on every machine."""
