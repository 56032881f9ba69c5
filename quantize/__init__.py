"""Quantizers: round one matrix, or a whole checkpoint with or without calibration text.

Imported as `qmix.quantize`, never by the folder's own name. Knows nothing of the command line.
"""
