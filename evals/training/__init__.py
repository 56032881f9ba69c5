"""How evals/tiny came to be: its model, its tokenizer, its training."""
