"""Text and token ids: tokenizer, detokenizer, chat template, and what a terminal may show.

Knows nothing of weights, models or their files.
"""
