"""Ctrl-C as a key of this program alone, where the signal would also end `tee` behind a pipe."""

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from prompt_toolkit.input import Input
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.key_binding import KeyPress
from prompt_toolkit.keys import Keys


@contextmanager
def interrupt_key(keyboard: Input) -> Iterator[None]:
    """Interrupt the main thread when Ctrl-C is read; other keys wait for the next prompt.

    The terminal must not make a signal of Ctrl-C itself, and must hand on every key.
    """
    keys: list[KeyPress] = []
    ended, end = os.pipe()
    reading = threading.Thread(target=_read, args=(keyboard, ended, keys), daemon=True)
    reading.start()
    try:
        yield
    finally:
        os.close(end)
        reading.join()
        os.close(ended)
        store_typeahead(keyboard, keys)


def _read(keyboard: Input, ended: int, keys: list[KeyPress]) -> None:
    """Read keys until the other side of the pipe `ended` is closed."""
    main = threading.main_thread().ident
    assert main is not None
    while not keyboard.closed:
        ready, _, _ = select.select([keyboard.fileno(), ended], [], [])
        if ended in ready:
            return
        for key in keyboard.read_keys():
            if key.key == Keys.ControlC:
                signal.pthread_kill(main, signal.SIGINT)
            else:
                keys.append(key)
