"""What each command of `qmix` does, behind the options that cli.py parses.

Nothing else imports from here.
"""
