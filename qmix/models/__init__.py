"""The public models, and how they are loaded, packed, offloaded and saved.

The interface is that of Hugging Face's Mixtral:
https://huggingface.co/docs/transformers/v4.38.1/en/model_doc/mixtral
"""
