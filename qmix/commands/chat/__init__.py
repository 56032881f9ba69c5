"""What a chat can do beside talking: its commands, saved conversations, and looks into a reply.

Knows a conversation only as qmix.commands.session, and nothing of how lines are read or drawn.
"""
