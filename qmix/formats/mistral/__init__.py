"""Mistral's own release: pickled shards and params.json, read as if they were Hugging Face's."""
