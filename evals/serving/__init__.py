"""What the measurements of `qmix serve` share: servers in processes of their own, and callers.

Callers speak HTTP as strangers do. Knows nothing of what is measured.
"""
