"""Windows scored by several processes, and kept as they are scored. Knows no checkpoint's numbers.

The processes and their exchange are `qmix.processes`.
"""
