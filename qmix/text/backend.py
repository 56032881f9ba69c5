"""What encodes behind a tokenizer: the pieces by id, the added tokens, and text to ids.

One of sentencepiece, one of the tokenizers library; LlamaTokenizer is the same over both.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Protocol

from qmix.text.detokenizer import Pieces

if TYPE_CHECKING:
    from tokenizers import AddedToken

# Which added tokens a text may name: all, those that are not special, or none of them.
Match = Literal["all", "not special", "none"]
# sentencepiece's mark for a space inside a piece. Typed by a user it decodes to a space, so it is
# the one character that does not survive the round trip.
SPACE_MARK = "\u2581"
MAX_PIECES = 1 << 18  # more than any published vocabulary


class Backend(Protocol):
    """Text to ids, without the tokens that go around a text."""

    @property
    def pieces(self) -> Pieces:
        """Every token by id."""
        ...

    @property
    def ids(self) -> Mapping[str, int]:
        """The id of every token by its name."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of ids without those that were added."""
        ...

    @property
    def added(self) -> "Mapping[int, AddedToken]":
        """The added tokens by id, special ones and others."""
        ...

    @property
    def defaults(self) -> Mapping[str, str]:
        """Special tokens (bos_token, eos_token, ...) where no config names them."""
        ...

    def encode(self, text: str, *, match: Match = "all", starts: bool = True) -> list[int]:
        """The ids of a text.

        Args:
            match: which added tokens are recognised in it; the others are ordinary characters.
            starts: the text is a beginning, which gets the space in front that the model was
                trained with; False: it continues another.
        """
        ...


def byte_of(name: str) -> int:
    """The byte of a byte piece, such as <0x0A>.

    Raises:
        ValueError: it is none.
    """
    value = int(name[1:-1], 16)
    if name != f"<0x{value:02X}>" or value > 255:
        raise ValueError(f"the byte piece {name[:40]!r}")
    return value
