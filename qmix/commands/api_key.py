"""The key of a server, as who serves and who calls give it: by a file or the environment.

Knows no server.
"""

import os
from pathlib import Path

from qmix.errors import UsageError
from qmix.files import regular_file

VARIABLE = "QMIX_API_KEY"
_FILE_BYTES = 4096


def read_key(file: Path | None, given: str | None = None) -> str | None:
    """The key of the file, or `given`, or else the environment's; None: there is none.

    Raises:
        UsageError: two keys, or one that is none.
        CheckpointError: the file cannot be read.
    """
    if given is not None and file is not None:
        raise UsageError("--api-key and --api-key-file contradict each other")
    key = os.environ.get(VARIABLE) if given is None else given
    if file is not None:
        data = regular_file.read(file, limit_bytes=_FILE_BYTES)
        key = data.decode("utf-8", "replace").strip()
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise UsageError("not a key", where="--api-key", expected="printable ASCII without spaces")
    return key
