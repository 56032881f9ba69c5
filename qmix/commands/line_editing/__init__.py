"""Where the chat's messages come from: a line editor on a terminal, plain lines elsewhere.

Knows no commands and no model. prompt_toolkit is imported by those files alone that need it.
"""
