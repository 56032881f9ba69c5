"""What other programs demand of a checkpoint: one file a program, and a table of what was examined.

Knows headers and settings; opens no file and runs no program.
"""
