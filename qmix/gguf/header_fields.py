"""The fields of a GGUF header, read one after another; each claim is checked before it is followed.

A count or a length that the rest of the file cannot hold is refused before anything is allocated.
Knows no key and no tensor. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from qmix.errors import CheckpointError
from qmix.printable import escaped

# Of a number, a flag, a string, numbers, flags (as bytes of 0 or 1), or strings.
Value = int | float | bool | str | array | tuple[str, ...]  # type: ignore[type-arg]

# A real header has under 2 MB for 32,000 tokens, and 8 MB for 128,000 with their merges.
HEADER_BYTES = 32 << 20
_NAME_BYTES = 1 << 16  # of a key

# Number of a value's type -> its typecode for struct and array.
_NUMBERS: Mapping[int, str] = dict(enumerate("BbHhIif")) | dict(enumerate("Qqd", start=10))
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class HeaderFields:
    """Reads fields from the file's position on; each method advances it.

    Attributes:
        file: open at a field.
        path: of the file, for errors.
        file_bytes: its size.
    """

    file: BufferedReader
    path: Path
    file_bytes: int

    def wrong(
        self, what: str, expected: object = None, found: object = None, remedy: str | None = None
    ) -> CheckpointError:
        """The error of a header that is not a GGUF file's."""
        shown = None if found is None else str(found)[:80]
        return CheckpointError(
            what, where=str(self.path), expected=expected, found=shown, remedy=remedy
        )

    def position(self) -> int:
        """The offset of the next field."""
        return self.file.tell()

    def number(self, typecode: str, what: str) -> int:
        """An integer by its typecode for struct."""
        (value,) = struct.unpack(f"<{typecode}", self._bytes(struct.calcsize(typecode), what))
        assert isinstance(value, int)
        return value

    def count(self, what: str, least_bytes: int) -> int:
        """A number of things that take at least `least_bytes` each."""
        value = self.number("Q", what)
        return self._fitting(value, least_bytes, what)

    def string(self, what: str, limit_bytes: int = HEADER_BYTES) -> str:
        """A string of UTF-8, after its length."""
        length = self.count(f"the length of {what}", 1)
        if length > limit_bytes:
            raise self.wrong(f"{what} is too long", f"at most {limit_bytes} B", f"{length} B")
        raw = self._bytes(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.wrong(f"{what} is not UTF-8", found=ascii(raw[:24])) from None

    def key(self) -> str:
        """The name of a value."""
        return self.string("a key", _NAME_BYTES)

    def value(self, key: str) -> Value:
        """The value of `key`, after its type."""
        what = f"the value of {escaped(key[:80])}"
        kind = self.number("I", f"the type of {what}")
        if kind != _ARRAY:
            return self._scalar(kind, what)
        kind = self.number("I", f"the type of {what}")
        if kind == _ARRAY:
            raise self.wrong(f"{what} is an array of arrays", "numbers, flags or strings")
        return self._array(kind, what)

    def _scalar(self, kind: int, what: str) -> Value:
        if kind == _STRING:
            return self.string(what)
        if kind == _BOOL:
            return bool(self._flags(self._bytes(1, what), what)[0])
        typecode = self._typecode(kind, what)
        (value,) = struct.unpack(f"<{typecode}", self._bytes(struct.calcsize(typecode), what))
        assert isinstance(value, (int, float))
        return value

    def _array(self, kind: int, what: str) -> Value:
        if kind == _STRING:
            count = self.count(f"the length of {what}", 8)
            return tuple(self.string(what) for _ in range(count))
        if kind == _BOOL:
            count = self.count(f"the length of {what}", 1)
            return array("B", self._flags(self._bytes(count, what), what))
        numbers = array(self._typecode(kind, what))
        count = self.count(f"the length of {what}", numbers.itemsize)
        numbers.frombytes(self._bytes(count * numbers.itemsize, what))
        return numbers

    def _typecode(self, kind: int, what: str) -> str:
        if kind not in _NUMBERS:
            raise self.wrong(f"{what} has an unknown type", "0 to 12", kind)
        return _NUMBERS[kind]

    def _flags(self, raw: bytes, what: str) -> bytes:
        if other := raw.translate(None, b"\0\1"):
            raise self.wrong(f"{what} is no flag", "0 or 1", other[0])
        return raw

    def _fitting(self, count: int, least_bytes: int, what: str) -> int:
        left = min(self.file_bytes, HEADER_BYTES) - self.position()
        if count * least_bytes > left:
            raise self.wrong(
                f"{what} is {count}: the file has no room for that",
                f"at most {max(left, 0) // least_bytes}",
                count,
                remedy="The file is damaged, or its download is incomplete.",
            )
        return count

    def _bytes(self, count: int, what: str) -> bytes:
        self._fitting(count, 1, what)
        raw = self.file.read(count)
        if len(raw) != count:
            raise self.wrong(f"the file ends inside {what}", f"{count} B", f"{len(raw)} B")
        return raw
