"""What 4 bits cost: perplexity and divergence, one layer at a time; the methods, scored; the demo.

Knows nothing of time or of traces.
"""
