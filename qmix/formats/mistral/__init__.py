"""Mistral's own checkpoints, pickles or safetensors with params.json, read as Hugging Face's.

Knows nothing of output.
"""
