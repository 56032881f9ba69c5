"""Text and ids: tokenizers, the chat template, and what may be shown on a terminal.

Knows nothing of tensors, weights, models or files of weights.
"""
