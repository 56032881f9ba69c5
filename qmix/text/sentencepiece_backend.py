"""A `tokenizer.model` as the backend of a tokenizer: sentencepiece between the added tokens.

The tokenizers library finds the added tokens in a text. Knows no files.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from qmix.text.backend import MAX_PIECES, SPACE_MARK, Match, byte_of
from qmix.text.detokenizer import Pieces
from qmix.text.sentencepiece_file import check_model, damaged
from qmix.text.tokenizer_config import TokenizerConfig
from qmix.text.vocabulary import without_space_prefix

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer

_ORDINARY = "ordinary text"  # the one word of the model that finds added tokens


class SentencePieceBackend:
    """Byte-fallback BPE, in which no character is unknown. See `backend.Backend`.

    Args:
        model: the bytes of a `tokenizer.model`.
        config: names the added tokens, above the model's own or in place of one.
        where: names the model file in errors.

    Raises:
        CheckpointError: the model is damaged, or an entry of the config is.
    """

    def __init__(self, model: bytes, config: TokenizerConfig, *, where: str) -> None:
        from sentencepiece import SentencePieceProcessor

        check_model(model, where)
        self._model = model
        try:
            self._sp = SentencePieceProcessor(model_proto=model)
            self.vocab_size = int(self._sp.get_piece_size())
            if self.vocab_size > MAX_PIECES:
                raise ValueError(f"{self.vocab_size} pieces")
            names = [self._sp.id_to_piece(i) for i in range(self.vocab_size)]
            self.added = self._added(names, config)
            self.pieces = self._pieces(names)
        except (RuntimeError, ValueError) as error:  # UnicodeDecodeError is a ValueError
            raise damaged(where, str(error)[:120]) from None
        sp = self._sp
        ids = {"bos": sp.bos_id(), "eos": sp.eos_id(), "unk": sp.unk_id(), "pad": sp.pad_id()}
        self.defaults = {
            f"{name}_token": names[index]
            for name, index in ids.items()
            if 0 <= index < self.vocab_size
        }
        named = reversed(list(enumerate(self.pieces.names)))
        self.ids = {name: index for index, name in named}
        self._added_ids = {token.content: index for index, token in sorted(self.added.items())}
        special = [token for token in self.added.values() if token.special]
        others = [token for token in self.added.values() if not token.special]
        self._finders = {"all": _finder([*special, *others]), "not special": _finder(others)}

    def encode(self, text: str, *, match: Match = "all", starts: bool = True) -> list[int]:
        """See `backend.Backend`."""
        ids: list[int] = []
        for part, added in self._parts(text, match):
            if added is None:
                ids += (self._sp if starts else self._continued).encode(part)
            else:
                ids.append(added)
            starts = False  # what follows an added token goes on, as in transformers 5
        return ids

    def _parts(self, text: str, match: Match) -> Iterator[tuple[str, int | None]]:
        """The text cut at its added tokens: (ordinary text, None) or ("", the token's id)."""
        finder = None if match == "none" else self._finders[match]
        if finder is None or not any(name in text for name in self._added_ids):
            yield text, None
            return
        found = finder.encode(text, add_special_tokens=False)
        for index, (start, end) in zip(found.ids, found.offsets, strict=True):
            name = finder.id_to_token(index)
            if name == _ORDINARY:
                yield text[start:end], None
            else:
                yield "", self._added_ids[str(name)]

    @cached_property
    def _continued(self) -> "SentencePieceProcessor":
        """The same model, which puts no space in front of a text."""
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=without_space_prefix(self._model))

    def _added(self, names: list[str], config: TokenizerConfig) -> "dict[int, AddedToken]":
        """The model's control tokens and its unknown one, then what the config adds."""
        from tokenizers import AddedToken

        sp = self._sp
        added = {
            index: AddedToken(name, special=True, normalized=False)
            for index, name in enumerate(names)
            if sp.is_control(index) or sp.is_unknown(index)
        }
        added |= config.added_above(len(names))
        ids = {name: index for index, name in reversed(list(enumerate(names)))}
        ids |= {token.content: index for index, token in added.items()}
        for token in config.extra_special_tokens():
            index = ids.setdefault(token.content, max([len(names) - 1, *added]) + 1)
            added.setdefault(index, token)
        return added

    def _pieces(self, names: list[str]) -> Pieces:
        """The pieces of the model, followed by the tokens that were added above them."""
        sp, size = self._sp, len(names)
        bytes_by_id = {i: bytes((byte_of(names[i]),)) for i in range(size) if sp.is_byte(i)}
        spaced = next((i for i in range(size) if names[i].startswith(SPACE_MARK)), None)
        names = names + [""] * (max([size - 1, *self.added]) + 1 - size)
        texts = [name.replace(SPACE_MARK, " ") for name in names]
        for index, token in self.added.items():
            names[index] = texts[index] = token.content
        return Pieces(
            names=tuple(names),
            texts=tuple(texts),
            bytes_by_id=bytes_by_id,
            controls=frozenset(i for i, token in self.added.items() if token.special),
            drops_first_space=spaced is not None and sp.decode([spaced]) != texts[spaced],
        )


def _finder(tokens: "list[AddedToken]") -> "Tokenizer | None":
    """A tokenizer of one word that knows the added tokens only."""
    from tokenizers import Tokenizer, models

    if not tokens:
        return None
    finder = Tokenizer(models.WordLevel({_ORDINARY: 0}, _ORDINARY))
    finder.add_tokens(tokens)
    return finder
