"""The commands of `qmix`: the options of each, what it calls, and what it prints.

Knows no weights and no layers: the rooms below do the work. Only cli.py imports from here.
"""
