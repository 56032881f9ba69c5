"""One command in several processes: how they are started, and what they tell one another.

The processes and their exchange are torch's and accelerate's. Knows nothing of what is computed.
"""
