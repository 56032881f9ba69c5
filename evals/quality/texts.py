"""Texts to score, read from files as people have them. Knows nothing of models."""

import codecs
import hashlib
from dataclasses import dataclass
from pathlib import Path

from qmix.errors import CheckpointError
from qmix.files import regular_file
from qmix.quantities import counted

_TEXT_BYTES = 1 << 30


@dataclass(frozen=True)
class Text:
    """A text and the SHA-256 of its UTF-8 bytes.

    Attributes:
        changes: what was changed of the file's text, in words.
    """

    content: str
    sha256: str
    changes: tuple[str, ...] = ()

    @classmethod
    def of(cls, content: str, changes: tuple[str, ...] = ()) -> "Text":
        """The text with its SHA-256."""
        return cls(content, hashlib.sha256(content.encode()).hexdigest(), changes)


def read_text(data: Path, *, as_it_is: bool = False) -> Text:
    """Read a text file, or a pipe that is being written.

    Args:
        as_it_is: keep the byte-order mark and the line ends CRLF that Windows writes; they cost
            tokens that no model saw in training.

    Raises:
        CheckpointError: not a file, unreadable, over 1 GiB, empty or not UTF-8.
    """
    raw = regular_file.read_given(data, limit_bytes=_TEXT_BYTES)
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise CheckpointError(
            "not UTF-8",
            where=str(data),
            found="UTF-16, as Windows writes it",
            remedy="Convert it: iconv -f UTF-16 -t UTF-8",
        )
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            "not UTF-8",
            where=str(data),
            found=f"byte {raw[error.start]:#04x} at offset {error.start}",
            remedy="Convert the text to UTF-8 first.",
        ) from None
    changes = []
    if not as_it_is and content.startswith("\ufeff"):
        content = content[1:]
        changes.append("a byte-order mark was dropped")
    if not as_it_is and (ends := content.count("\r\n")):
        content = content.replace("\r\n", "\n")
        changes.append(f"{counted(ends, 'line end')} CRLF became LF")
    if not content:
        raise CheckpointError("the text is empty", where=str(data))
    return Text.of(content, tuple(changes))
