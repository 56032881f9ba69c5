"""Whether launches are tuned: what the user's environment says. Knows no torch."""

import os

from qmix.errors import UsageError

VARIABLE = "QMIX_TUNE"


def is_wanted() -> bool:
    """Whether tunings are used, and searched for.

    Raises:
        UsageError: the variable is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "") or "1"
    if value not in ("0", "1"):
        raise UsageError("unknown value", where=VARIABLE, expected="0 or 1", found=value)
    return value == "1"
