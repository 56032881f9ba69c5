"""Quantizers: one algorithm a file. Imported as `qmix.quantize`, never by the folder's own name."""
