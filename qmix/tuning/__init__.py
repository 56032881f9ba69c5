"""The search for the fastest launches on a card, and the file that keeps what was found.

Knows the choices of a decode step, and no model, kernel or clock: these are handed in.
"""
