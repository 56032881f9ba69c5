"""The page that a server shows at `/`: a chat in one document that loads nothing from elsewhere.

Python here joins sources; it knows no requests, and the page knows the API alone.
"""
