"""Mistral's own checkpoints: pickles or safetensors and params.json, read as Hugging Face's weights.

Knows nothing of output.
"""
