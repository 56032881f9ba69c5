"""The CPU's products of 4-bit weights: a C++ source, compiled at first use, and its callers."""
