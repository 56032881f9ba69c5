"""Markdown drawn on a terminal while it is written: what has been drawn is never drawn again.

Knows no model and no session. The containers and leaves of a text are found line by line here,
because markdown-it has no mode for a text that still grows; what stands inside a line, and tables,
are markdown-it's.
"""
