"""Tokens by name, by id and as text, and which are special: a tokenizer without its encoding."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from qmix.errors import UsageError, wrong_value
from qmix.text.backend import Backend
from qmix.text.detokenizer import Pieces, StreamDetokenizer
from qmix.text.tokenizer_config import SPECIAL_TOKENS, TokenizerConfig

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from torch import Tensor


class TokenTable:
    """The tokens of a vocabulary, in transformers' words.

    Args:
        backend: knows them all.
        config: names the special ones.

    Raises:
        CheckpointError: the config names a token that the vocabulary has not.
    """

    def __init__(self, backend: Backend, config: TokenizerConfig) -> None:
        self.pieces: Pieces = backend.pieces
        self._vocab_size = backend.vocab_size
        self._added = backend.added
        self._ids = backend.ids
        self._special: dict[str, int] = {}
        named = {name: token.content for name, token in config.special_tokens().items()}
        for name, token in {**backend.defaults, **named}.items():
            if token not in self._ids:
                raise config.unknown_token(name)
            self._special[name] = self._ids[token]
        self._extra = [token.content for token in config.extra_special_tokens()]

    @property
    def vocab_size(self) -> int:
        """Number of ids of the vocabulary, without added tokens."""
        return self._vocab_size

    def __len__(self) -> int:
        return len(self._ids)

    def __bool__(self) -> bool:
        return True

    @property
    def bos_token_id(self) -> int | None:
        return self._special.get("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special.get("eos_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._special.get("unk_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._special.get("pad_token")

    @pad_token_id.setter
    def pad_token_id(self, index: int | None) -> None:
        self._set("pad_token", None if index is None else self._named(index))

    @property
    def bos_token(self) -> str | None:
        return self._name(self.bos_token_id)

    @bos_token.setter
    def bos_token(self, token: str | None) -> None:
        self._set("bos_token", token)

    @property
    def eos_token(self) -> str | None:
        return self._name(self.eos_token_id)

    @eos_token.setter
    def eos_token(self, token: str | None) -> None:
        self._set("eos_token", token)

    @property
    def unk_token(self) -> str | None:
        return self._name(self.unk_token_id)

    @unk_token.setter
    def unk_token(self, token: str | None) -> None:
        self._set("unk_token", token)

    @property
    def pad_token(self) -> str | None:
        return self._name(self.pad_token_id)

    @pad_token.setter
    def pad_token(self, token: str | None) -> None:
        self._set("pad_token", token)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens that have a name: bos_token, eos_token and so on."""
        names = self.pieces.names
        return {
            name: names[self._special[name]] for name in SPECIAL_TOKENS if name in self._special
        }

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token of the config, each once."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self._extra]))

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids."""
        return [self._ids[token] for token in self.all_special_tokens]

    @property
    def added_tokens_decoder(self) -> "Mapping[int, AddedToken]":
        """The added tokens by id."""
        return dict(sorted(self._added.items()))

    def add_special_tokens(self, special_tokens: Mapping[str, str]) -> int:
        """Set special tokens by name, of those that the vocabulary has; returns 0, the new ones.

        Raises:
            UsageError: another name, or a token that the model has no row for.
        """
        for name, token in special_tokens.items():
            if name not in SPECIAL_TOKENS:
                raise wrong_value("special_tokens", "one of " + ", ".join(SPECIAL_TOKENS), name)
            self._set(name, token)
        return 0

    def get_vocab(self) -> dict[str, int]:
        """The id of every token by its name."""
        return dict(self._ids)

    def get_added_vocab(self) -> dict[str, int]:
        """The id of every added token by its text."""
        return {token.content: index for index, token in sorted(self._added.items())}

    def convert_ids_to_tokens(
        self, ids: "int | Sequence[int] | Tensor", skip_special_tokens: bool = False
    ) -> str | list[str | None] | None:
        """The names of pieces: `▁My`, `<0x0A>`, `</s>`; None for an id above the vocabulary."""
        skipped = self.pieces.controls if skip_special_tokens else ()
        listed = [index for index in self._checked(ids) if index not in skipped]
        if isinstance(ids, int):
            return self._name(self._checked(ids)[0])
        return [self._name(index) for index in listed]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """The ids of pieces by name; an unknown name gives the unk id."""
        if isinstance(tokens, str):
            return self._ids.get(tokens, self.unk_token_id)
        if not isinstance(tokens, (list, tuple)) or not all(isinstance(t, str) for t in tokens):
            raise wrong_value("tokens", "a string, or a list of strings", tokens)
        return [self._ids.get(token, self.unk_token_id) for token in tokens]

    def decode(
        self,
        ids: "int | Sequence[int] | Tensor",
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """The text of ids.

        The first piece loses the space that encoding put in front; no other piece does. Control
        tokens are left out, or written in their place: `<s> text</s> text`. A control token ends a
        byte sequence. Each broken byte gives one U+FFFD. An id above the vocabulary, a row of a
        padded embedding, has no text.

        Args:
            clean_up_tokenization_spaces: has no effect on the text of such a vocabulary, as in
                transformers 5.

        Raises:
            UsageError: a negative id, or what is none.
        """
        stream = StreamDetokenizer(self, skip_special_tokens=skip_special_tokens)
        parts = [stream.put(i) for i in self._checked(ids)]
        return "".join(parts) + stream.end()

    def batch_decode(
        self,
        sequences: "Iterable[Sequence[int] | Tensor]",
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """Apply `decode` to each row."""
        return [self.decode(row, skip_special_tokens) for row in sequences]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of pieces by name."""
        ids = self.convert_tokens_to_ids(list(tokens))
        assert isinstance(ids, list)
        return self.decode([index for index in ids if index is not None])

    def _name(self, index: int | None) -> str | None:
        names = self.pieces.names
        return None if index is None or index >= len(names) else names[index]

    def _named(self, index: object) -> str:
        name = self._name(index) if type(index) is int and index >= 0 else None
        if not name:
            raise wrong_value("pad_token_id", "the id of a token of the vocabulary", index)
        return name

    def _set(self, name: str, token: object) -> None:
        from tokenizers import AddedToken

        if isinstance(token, AddedToken):
            token = token.content
        if token is None:
            self._special.pop(name, None)
        elif isinstance(token, str) and token in self._ids:
            self._special[name] = self._ids[token]
        else:
            raise UsageError(
                "not a token of the vocabulary",
                where=name,
                found=repr(token)[:80],
                remedy="Tokens are not added here: give one that it has, such as the end token.",
            )

    def _checked(self, ids: "int | Sequence[int] | Tensor") -> list[int]:
        """A flat list of ids, of which none is negative."""
        if not isinstance(ids, (int, Sequence)) and not hasattr(ids, "tolist"):
            raise wrong_value("ids", "token ids", ids)
        listed = ids if isinstance(ids, (int, Sequence)) else ids.tolist()
        listed = [listed] if isinstance(listed, int) else list(listed)
        for index in listed:
            if isinstance(index, bool) or not isinstance(index, int) or index < 0:
                expected = f"token ids from 0 to {len(self.pieces.names) - 1}, one row"
                raise wrong_value("ids", expected, index)
        return listed
