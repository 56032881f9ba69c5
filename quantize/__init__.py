"""Quantizing checkpoints: one matrix (`rounding`), weights alone (`streaming`), on calibration text.

Imported as `qmix.quantize`, never by the folder's own name. Knows nothing of the command line.
"""
