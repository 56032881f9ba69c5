"""What 4 bits cost: perplexity, divergence, one layer at a time; and the demo."""
