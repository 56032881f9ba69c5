"""File descriptors: a connection is one, and a process without any can neither accept nor refuse.

Knows no connections.
"""

import sys

_WANTED = 1 << 16  # systems give programs 1,024 if they do not ask
# Files of a model, a template's process, and connections that have been accepted but not counted.
_OTHERS = 128


def raise_limit() -> None:
    """Let the process have as many as the system allows."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections() -> int:
    """How many connections leave enough for all else."""
    if sys.platform == "win32":
        return _WANTED
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _WANTED if soft == resource.RLIM_INFINITY else soft
    return max(limit - _OTHERS, limit // 2)
