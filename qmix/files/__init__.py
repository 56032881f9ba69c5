"""Files and directories of any kind: whole writes, checked reads, and what the system says of both.

Knows nothing of what a file holds.
"""
