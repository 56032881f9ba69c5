"""PromptLog: what callers ask, in a file, if whoever starts the server wants it. Knows no API."""

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmix.files.file_errors import writing

_LOGGER = logging.getLogger(__name__)


class PromptLog:
    """Appends a line of JSON for each request. A disk that is full ends no request.

    The file is opened for each line, so that it may be moved away meanwhile.

    Args:
        path: of a file that only its owner can read if it is new.

    Raises:
        WriteError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._is_whole = True  # whether the last line is
        with writing(path):
            os.close(self._opened())

    def put(self, path: str, body: Mapping[str, Any]) -> None:
        """Append what was sent to a path. For any thread."""
        entry = {"time": round(time.time(), 3), "path": path, "body": body}
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            was_whole = self._is_whole
            data = line if was_whole else b"\n" + line
            try:
                self._is_whole = self._append(data) == len(data)
            except OSError:
                self._is_whole = False
            if was_whole and not self._is_whole:
                _LOGGER.warning("%s: prompts are lost: it cannot be written to", self._path)

    def _append(self, data: bytes) -> int:
        """Bytes that were written: fewer where a disk is full."""
        descriptor = self._opened()
        try:
            return os.write(descriptor, data)
        finally:
            os.close(descriptor)

    def _opened(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
