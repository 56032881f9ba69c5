"""A file of prompts answered by an engine, without HTTP: line by line, in order, exactly once.

Knows no network.
"""
