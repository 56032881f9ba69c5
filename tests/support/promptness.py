"""A limit on a step: processor time, which other work on the machine cannot use up."""

import time
from contextlib import contextmanager


@contextmanager
def within(seconds):
    """The block takes less than `seconds` of this process's processor time, raising or not."""
    begun = time.process_time()
    try:
        yield
    finally:
        taken = time.process_time() - begun
        assert taken < seconds, f"{taken:.2f} s of processor time, where {seconds} are allowed"
