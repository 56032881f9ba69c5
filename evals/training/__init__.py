"""How evals/tiny was made: its tokenizer, its text, its training.

Knows nothing of 4 bits.
"""
