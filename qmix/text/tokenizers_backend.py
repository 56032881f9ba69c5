"""A `tokenizer.json` as the backend of a tokenizer, through the tokenizers library.

Ids come from the library. Text is put together from the pieces, so that streaming and decoding
agree; its decoders that sentencepiece and byte-level vocabularies need are read. Knows no files.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qmix.errors import CheckpointError, UnsupportedError
from qmix.text.backend import MAX_PIECES, SPACE_MARK, Match, byte_of
from qmix.text.detokenizer import Pieces

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

JSON_FILE = "tokenizer.json"
_READ = ("Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "ByteLevel")


class TokenizersBackend:
    """Any vocabulary that the tokenizers library reads. See `backend.Backend`.

    Args:
        data: the bytes of a `tokenizer.json`.
        added: tokens that its config adds; those that it has already stay as they are.
        where: names the file in errors.

    Attributes:
        before, after: ids that the file's own post-processor puts around a text.

    Raises:
        CheckpointError: the file is damaged.
        UnsupportedError: a decoder that is not read.
    """

    def __init__(self, data: bytes, added: "Sequence[AddedToken]", *, where: str) -> None:
        self._tokenizer = _parsed(data, where)
        padding = self._tokenizer.padding
        self.defaults = {} if padding is None else {"pad_token": str(padding["pad_token"])}
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.add_tokens(list(added))
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=False)
        self.added: Mapping[int, AddedToken] = self._tokenizer.get_added_tokens_decoder()
        self.ids: Mapping[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.pieces = _pieces(self._tokenizer, self.ids, self.added, where)
        self._all_special = all(token.special for token in self.added.values())
        self.before, self.after = _around(self._tokenizer, len(self.pieces.names), where)

    def encode(self, text: str, *, match: Match = "all", starts: bool = True) -> list[int]:
        """See `backend.Backend`."""
        if starts:
            return self._encode(text, match)
        # A normalizer may put a space in front of a beginning; behind a newline there is none.
        newline = self._encode("\n", match)
        ids = self._encode("\n" + text, match)
        if ids[: len(newline)] == newline:
            return ids[len(newline) :]
        return self._encode(text, match)

    def saved(self, before: Mapping[str, int], after: Mapping[str, int]) -> bytes:
        """The bytes of a `tokenizer.json` that puts other tokens around a text.

        Args:
            before, after: ids by token.
        """
        from tokenizers import Tokenizer, processors

        copy = Tokenizer.from_str(self._tokenizer.to_str())
        copy.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{name}:1" for name in before), "$B:1"],
            special_tokens=list({**before, **after}.items()),
        )
        return copy.to_str(pretty=True).encode()

    @cached_property
    def _splitting(self) -> "Tokenizer":
        """The same tokenizer, for which special tokens in a text are ordinary characters."""
        from tokenizers import Tokenizer

        copy = Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = True
        return copy

    def _encode(self, text: str, match: Match) -> list[int]:
        if match == "none" or (match == "not special" and self._all_special):
            return self._plain(text)
        tokenizer = self._tokenizer if match == "all" else self._splitting
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _plain(self, text: str) -> list[int]:
        """The steps of the library, without the one that looks for added tokens."""
        tokenizer = self._tokenizer
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        words = [text]
        if tokenizer.pre_tokenizer is not None:
            words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in tokenizer.model.tokenize(word)]


def _around(tokenizer: "Tokenizer", size: int, where: str) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and after a text, as its settings say.

    Asking it would end the process where its settings name tokens that they do not describe.

    Raises:
        CheckpointError: so they do.
    """
    processor = tokenizer.post_processor
    document = {} if processor is None else json.loads(processor.__getstate__())
    sides: tuple[list[int], list[int]] = ([], [])
    for step in document.get("processors", [document]):
        if step.get("type") in ("BertProcessing", "RobertaProcessing"):
            sides[0].append(step["cls"][1])
            sides[1].append(step["sep"][1])
        side = 0
        for piece in step.get("single", ()):
            if "Sequence" in piece:
                side = 1
                continue
            name = piece["SpecialToken"]["id"]
            token = step["special_tokens"].get(name)
            if token is None:
                raise _damaged(f"{where}: post_processor", f"no token {name!r}")
            sides[side].extend(token["ids"])
    if any(index >= size for side in sides for index in side):
        raise _damaged(f"{where}: post_processor", f"ids above {size - 1}")
    return sides


def _parsed(data: bytes, where: str) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:  # noqa: BLE001 - the library raises Exception itself
        raise _damaged(where, str(error)[:120]) from None


def _damaged(where: str, found: object) -> CheckpointError:
    return CheckpointError(
        "not a tokenizer, or a damaged one",
        where=where,
        found=found,
        remedy="Download the file again.",
    )


def _pieces(
    tokenizer: "Tokenizer", ids: Mapping[str, int], added: "Mapping[int, AddedToken]", where: str
) -> Pieces:
    size = max(ids.values(), default=-1) + 1
    if not 0 < size <= MAX_PIECES:
        raise _damaged(where, f"ids up to {size - 1}")
    names = [""] * size
    for name, index in ids.items():
        names[index] = name
    for index in added:  # one that is matched after normalization is named as it is matched
        names[index] = tokenizer.id_to_token(index) or ""
    steps = _decoders(tokenizer, where)
    kinds = [step["type"] for step in steps]
    controls = frozenset(index for index, token in added.items() if token.special)
    if "ByteLevel" in kinds:
        texts, by_id = names, _byte_level(names, controls)
    else:
        texts = [name.replace(SPACE_MARK, " ") for name in names]
        by_id = _byte_fallback(names) if "ByteFallback" in kinds else {}
    return Pieces(
        names=tuple(names),
        texts=tuple(texts),
        bytes_by_id=by_id,
        controls=controls,
        drops_first_space=any(_strips(step) for step in steps),
    )


def _decoders(tokenizer: "Tokenizer", where: str) -> list[dict[str, Any]]:
    """The steps of the decoder, one after the other.

    Raises:
        UnsupportedError: one that is not read, or no decoder.
    """
    decoder = tokenizer.decoder
    document = {"type": "none"} if decoder is None else json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = document.get("decoders", [document])
    for step in steps:
        if step["type"] not in _READ:
            raise UnsupportedError(
                "the tokenizer in this file is not read",
                where=f"{where}: decoder",
                expected="one of a sentencepiece or a byte-level vocabulary",
                found=repr(step["type"]),
                remedy="Give the tokenizer of a Mixtral.",
            )
    return steps


def _strips(step: Mapping[str, Any]) -> bool:
    """Whether a step of the decoder drops the space of the first piece."""
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme") != "never"
    return step["type"] == "Strip" and step.get("content") == " " and step.get("start", 0) > 0


def _byte_fallback(names: Sequence[str]) -> dict[int, bytes]:
    found = {}
    for index, name in enumerate(names):
        if len(name) == 6 and name.startswith("<0x"):
            try:
                found[index] = bytes((byte_of(name),))
            except ValueError:
                continue
    return found


def _byte_level(names: Sequence[str], controls: frozenset[int]) -> dict[int, bytes]:
    """The bytes of the pieces of a byte-level vocabulary, which spells each byte with a letter."""
    from tokenizers import pre_tokenizers

    # The letters of bytes that are no printable character follow U+0100, in the bytes' order.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = [letter for letter in letters if ord(letter) < 256]
    others = [byte for byte in range(256) if chr(byte) not in own]
    bytes_of = {letter: ord(letter) for letter in own}
    bytes_of |= dict(zip((x for x in letters if ord(x) > 255), others, strict=True))
    return {
        index: bytes(bytes_of[letter] for letter in name)
        if all(letter in bytes_of for letter in name)
        else name.encode()
        for index, name in enumerate(names)
        if index not in controls
    }
