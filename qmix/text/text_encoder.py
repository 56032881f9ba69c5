"""Texts to ids, alone or in batches: the part of a tokenizer that knows no files.

Calls have the form of Hugging Face's tokenizers, and give the same ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qmix.errors import UsageError, wrong_value
from qmix.text.batch_encoding import BatchEncoding, EncodingOptions
from qmix.text.sentencepiece_backend import SentencePieceBackend
from qmix.text.token_table import TokenTable
from qmix.text.tokenizer_config import TokenizerConfig
from qmix.text.tokenizers_backend import TokenizersBackend

_STATED = 10**20  # a longer model_max_length says that there is none, as in transformers


class TextEncoder(TokenTable):
    """What turns texts into ids, and puts special tokens around them.

    Args:
        backend: knows the vocabulary.
        config: names the special tokens, the sides of padding and truncation, and the length.

    Raises:
        CheckpointError: an entry of the config is wrong.
    """

    def __init__(
        self, backend: SentencePieceBackend | TokenizersBackend, config: TokenizerConfig
    ) -> None:
        super().__init__(backend, config)
        self._backend = backend
        self.padding_side = config.side("padding_side", "left")
        self.truncation_side = config.side("truncation_side", "right")
        self.model_max_length = config.model_max_length
        self.split_special_tokens = config.flag("split_special_tokens", False)
        if isinstance(backend, TokenizersBackend):  # its own post-processor counts
            self._before, self._after = backend.before, backend.after
        else:
            self._before = self._one("bos_token", config.flag("add_bos_token", True), [])
            self._after = self._one("eos_token", config.flag("add_eos_token", False), [])

    @property
    def add_bos_token(self) -> bool:
        """Whether encoding puts special tokens before a text."""
        return bool(self._before)

    @add_bos_token.setter
    def add_bos_token(self, adds: bool) -> None:
        self._before = self._one("bos_token", adds, self._before)

    @property
    def add_eos_token(self) -> bool:
        """Whether encoding puts special tokens after a text."""
        return bool(self._after)

    @add_eos_token.setter
    def add_eos_token(self, adds: bool) -> None:
        self._after = self._one("eos_token", adds, self._after)

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str | None]:
        """The names of the pieces of a text: `▁My`, `<0x0A>`, `</s>`."""
        return [self._name(index) for index in self.encode(text, add_special_tokens)]

    def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        *,
        split_special_tokens: bool | None = None,
        **options: Any,
    ) -> "list[int] | Any":
        """The ids of a text; with `add_special_tokens` the BOS id comes first.

        Args:
            split_special_tokens: a special token in the text is ordinary characters; default: the
                attribute of this name, False for most.
            options: as of a call, return_tensors="pt" among them: then a tensor (1, length).

        Raises:
            UsageError: not a string, or a string that is not Unicode text (a lone surrogate).
        """
        if not isinstance(text, str):
            raise wrong_value("text", "a string", text)
        if options:
            options |= {"split_special_tokens": split_special_tokens}
            return self(text, add_special_tokens=add_special_tokens, **options)["input_ids"]
        ids = self._ordinary(text, split_special_tokens)
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        return_tensors: str | None = None,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        split_special_tokens: bool | None = None,
        return_attention_mask: bool = True,
        return_token_type_ids: bool = False,
    ) -> BatchEncoding:
        """Encode one text or a batch into `input_ids` and `attention_mask`.

        Returns lists, or with `return_tensors="pt"` or "np" int64 arrays (rows, longest).
        `max_length` counts the special tokens; by default it is `model_max_length`.

        Raises:
            UsageError: a wrong option, or a tensor requested of rows that differ in length.
        """
        options = self._options(
            return_tensors, padding, truncation, max_length, padding_side, pad_to_multiple_of
        )
        if return_token_type_ids:
            raise wrong_value("return_token_type_ids", "False: the model has none", True)
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise UsageError("no text given", where="text")
        around = (self._before, self._after) if add_special_tokens else ([], [])
        rows = [
            options.truncated(self._ordinary(each, split_special_tokens), *around) for each in texts
        ]
        encoding = options.batch(rows, self._padding_id)
        if not return_attention_mask:
            del encoding["attention_mask"]
        if isinstance(text, str) and return_tensors is None:
            return BatchEncoding({name: each[0] for name, each in encoding.items()})
        return encoding

    def pad(
        self,
        encodings: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        return_tensors: str | None = None,
        padding_side: str | None = None,
    ) -> BatchEncoding:
        """Pad rows of ids that are encoded already.

        Args:
            encodings: a mapping with input_ids, or a list of such mappings.

        Raises:
            UsageError: neither, or a wrong option.
        """
        if isinstance(encodings, Mapping):
            rows = encodings.get("input_ids")
        else:
            rows = [each["input_ids"] for each in encodings]
        if not isinstance(rows, (list, tuple)):
            raise wrong_value("encodings", "a mapping with input_ids, lists of ids", encodings)
        options = self._options(return_tensors, padding, None, max_length, padding_side)
        return options.batch([self._checked(row) for row in rows], self._padding_id)

    @property
    def _padding_id(self) -> int | None:
        return self.eos_token_id if self.pad_token_id is None else self.pad_token_id

    def _options(
        self,
        return_tensors: str | None,
        padding: bool | str,
        truncation: bool | str | None,
        max_length: int | None,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> EncodingOptions:
        """How rows become a batch: what is not given is as this tokenizer has it.

        Raises:
            UsageError: a wrong option.
        """
        stated = self.model_max_length < _STATED
        if max_length is None and stated and (truncation or padding == "max_length"):
            max_length = self.model_max_length
        return EncodingOptions(
            return_tensors=return_tensors,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=self.padding_side if padding_side is None else padding_side,
            truncation_side=self.truncation_side,
        )

    def continued(self, text: str) -> list[int]:
        """The ids of a text that goes on behind others; no special token counts as one.

        Raises:
            UsageError: it is not Unicode text.
        """
        self._check_unicode(text)
        return self._backend.encode(text, match="none", starts=False)

    def _ordinary(self, text: str, split: bool | None) -> list[int]:
        """The ids of a text without what goes around it."""
        self._check_unicode(text)
        split = self.split_special_tokens if split is None else split
        return self._backend.encode(text, match="not special" if split else "all")

    def _check_unicode(self, text: str) -> None:
        if not isinstance(text, str):
            raise wrong_value("text", "a string", text)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"lone surrogate at character {error.start}",
                where="text",
                expected="Unicode text",
                found=ascii(text[error.start]),
                remedy="Decode the input as UTF-8, with errors='replace' if it is damaged.",
            ) from None

    def _one(self, name: str, adds: bool, present: list[int]) -> list[int]:
        if not isinstance(adds, bool):
            raise wrong_value(f"add_{name}", "True or False", adds)
        if not adds:
            return []
        index = self._special.get(name)
        return present or ([] if index is None else [index])
