"""A limit on a step: processor time, which other work on the machine cannot use up."""

import gc
import time
from contextlib import contextmanager


@contextmanager
def within(seconds):
    """The block takes less than `seconds` of this process's processor time, raising or not.

    The garbage of other tests is not collected meanwhile: that takes a second late in a long run.
    """
    gc.disable()
    begun = time.process_time()
    try:
        yield
    finally:
        taken = time.process_time() - begun
        gc.enable()
        assert taken < seconds, f"{taken:.2f} s of processor time, where {seconds} are allowed"
