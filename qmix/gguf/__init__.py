"""GGUF containers, the files of llama.cpp: their headers, and which files make up a model.

Knows the container only: no model, no tokenizer, and no bits of a tensor. No torch.
"""
