"""A terminal that keeps what is typed for the next reader and does not show it meanwhile."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def held_input(stream: TextIO, *, raw: bool, interrupts: bool = True) -> Iterator[None]:
    """Do not show what is typed while this is open.

    A stream that is no terminal, and a system without termios, are left as they are.

    Args:
        raw: keep every key, for a reader that edits lines itself; otherwise the terminal goes on
            editing them.
        interrupts: Ctrl-C interrupts, and drops nothing that waits; otherwise it is a key.
    """
    try:
        import termios
    except ImportError:
        yield
        return
    try:
        descriptor = stream.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):
        yield
        return
    held = termios.tcgetattr(descriptor)
    held[3] = held[3] & ~termios.ECHO | termios.NOFLSH
    if raw:
        held[0] &= ~termios.ICRNL
        held[3] &= ~termios.ICANON
    if not interrupts:
        held[6][termios.VINTR] = os.fpathconf(descriptor, "PC_VDISABLE").to_bytes()
    termios.tcsetattr(descriptor, termios.TCSANOW, held)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
