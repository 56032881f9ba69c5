"""Text to ids and back with sentencepiece, as Mixtral's checkpoints carry it (`tokenizer.model`).

Calls have the shape of Hugging Face's LlamaTokenizer. What a user types never becomes a control
token: `</s>` in a text is five ordinary characters. Knows nothing of models; torch only on demand.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import sentencepiece

from qmix import atomic_file, strict_json
from qmix.errors import CheckpointError, UsageError
from qmix.text import chat_template
from qmix.text.detokenizer import Pieces, StreamDetokenizer
from qmix.text.sentencepiece_file import MODEL_FILE, check_model, damaged, read_model

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "tokenizer_config.json"
ADDED_FILE = "added_tokens.json"
# sentencepiece's mark for a space inside a piece. Typed by a user it decodes to a space: the one
# character that does not survive the round trip.
SPACE_MARK = "\u2581"

# What a caller of from_pretrained may say instead of tokenizer_config.json.
_ENTRIES = (
    "add_bos_token",
    "add_eos_token",
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "model_max_length",
)
# Options of transformers about which class reads which file from where: here there is one of each.
_WITHOUT_EFFECT = (
    "cache_dir",
    "force_download",
    "legacy",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
    "use_auth_token",
    "use_fast",
)


class BatchEncoding(dict[str, Any]):
    """`input_ids` and `attention_mask` (1 keep, 0 padding), by key or as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this encoding has no {name!r}") from None

    def to(self, device: object) -> Self:
        """Move the tensors to `device`, in place; lists stay."""
        for name, value in self.items():
            if hasattr(value, "to"):
                self[name] = value.to(device)
        return self


class LlamaTokenizer:
    """The tokenizer of a Mixtral checkpoint: byte-fallback BPE, in which no character is unknown.

    Args:
        model: the bytes of a `tokenizer.model`.
        config: the document of a `tokenizer_config.json`: add_bos_token, add_eos_token, the
            bos, eos, unk and pad tokens, added_tokens_decoder. Other keys are carried, unread.
        where: names the model file in errors.

    `padding_side` ("left" or "right") may be set. `pad_token_id` is None unless the config names
    one; batches are then padded with the end-of-sequence id.

    Raises:
        CheckpointError: damaged model or config; the message names the file.
    """

    def __init__(
        self, model: bytes, config: Mapping[str, Any] | None = None, *, where: str = MODEL_FILE
    ) -> None:
        check_model(model, where)
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise damaged(where, str(error)[:120]) from None
        self._model = model
        self._config = dict(config or {})
        self._where = str(Path(where).with_name(CONFIG_FILE))
        self.pieces = self._read_pieces()
        self._ids = {name: i for i, name in reversed(list(enumerate(self.pieces.names)))}
        self.padding_side = "left"
        self.add_bos_token = self._flag("add_bos_token", True)
        self.add_eos_token = self._flag("add_eos_token", False)
        self.unk_token_id = self._special("unk_token", self._sp.unk_id())
        self.bos_token_id = self._special("bos_token", self._sp.bos_id())
        self.eos_token_id = self._special("eos_token", self._sp.eos_id())
        self.pad_token_id = self._special("pad_token", self._sp.pad_id())

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, padding_side: str = "left", **options: Any
    ) -> Self:
        """Read a checkpoint directory, or a `tokenizer.model` file by its path.

        A `tokenizer_config.json` beside it is honoured, and where that lists no added tokens, the
        `added_tokens.json` of fine-tunes before 2024. Data only: no code is ever loaded.

        Args:
            padding_side: "left" or "right".
            options: entries of tokenizer_config.json that are to be others: add_bos_token,
                add_eos_token, bos_token, eos_token, unk_token, pad_token, model_max_length. Options
                of transformers that cannot change the ids here (use_fast, legacy, revision, ...)
                are taken and change nothing.

        Raises:
            CheckpointError: a file is missing or damaged; the message names it.
            UsageError: an unknown option.
        """
        changes = _changes(options)
        path = Path(path)
        file = path / MODEL_FILE if path.is_dir() else path
        if not file.exists() and (path / "tokenizer.json").exists():
            raise CheckpointError(
                f"{MODEL_FILE} is missing",
                where=str(path),
                found="tokenizer.json, which qmix does not read",
                remedy=f"Copy {MODEL_FILE} from the original checkpoint into this directory.",
            )
        model = read_model(file)
        config_file = file.with_name(CONFIG_FILE)
        config = strict_json.read(config_file) if config_file.exists() else {}
        added = file.with_name(ADDED_FILE)
        if "added_tokens_decoder" not in config and added.exists():
            config["added_tokens_decoder"] = _decoder(strict_json.read(added), str(added))
        tokenizer = cls(model, {**config, **changes}, where=str(file))
        if padding_side not in ("left", "right"):
            raise _wrong("padding_side", "'left' or 'right'", padding_side)
        tokenizer.padding_side = padding_side
        return tokenizer

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `tokenizer.model` byte for byte, and `tokenizer_config.json`."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        # auto_map points at code, which is not carried.
        document = {key: value for key, value in self._config.items() if key != "auto_map"}
        document.update(
            tokenizer_class="LlamaTokenizer",
            add_bos_token=self.add_bos_token,
            add_eos_token=self.add_eos_token,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            unk_token=self.unk_token,
            pad_token=self.pad_token,
        )
        atomic_file.write(folder / MODEL_FILE, self._model)
        strict_json.write(folder / CONFIG_FILE, dict(sorted(document.items())))

    @property
    def vocab_size(self) -> int:
        """Ids of `tokenizer.model` itself, without added tokens."""
        return int(self._sp.get_piece_size())

    def __len__(self) -> int:
        return len(self.pieces.names)

    @property
    def bos_token(self) -> str | None:
        return self._name(self.bos_token_id)

    @property
    def eos_token(self) -> str | None:
        return self._name(self.eos_token_id)

    @property
    def unk_token(self) -> str | None:
        return self._name(self.unk_token_id)

    @property
    def pad_token(self) -> str | None:
        return self._name(self.pad_token_id)

    @pad_token.setter
    def pad_token(self, token: str | None) -> None:
        if token is not None and token not in self._ids:
            raise _wrong("pad_token", "a token of the vocabulary", token)
        self.pad_token_id = None if token is None else self._ids[token]

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def convert_ids_to_tokens(self, ids: "int | Sequence[int] | Tensor") -> str | list[str]:
        """The pieces' own names: `▁My`, `<0x0A>`, `</s>`."""
        names = [self.pieces.names[i] for i in self._checked(ids)]
        return names[0] if isinstance(ids, int) else names

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int | None] | None:
        """The ids of pieces by name; a name that is no piece gives the unknown id."""
        if isinstance(tokens, str):
            return self._ids.get(tokens, self.unk_token_id)
        return [self._ids.get(token, self.unk_token_id) for token in tokens]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; with `add_special_tokens` the begin id stands in front.

        Raises:
            UsageError: not a string, or a string that is not Unicode text (a lone surrogate).
        """
        if not isinstance(text, str):
            raise _wrong("text", "a string", text)
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
        ids: list[int] = self._sp.encode(text)
        if not add_special_tokens:
            return ids
        return [*self._front(), *ids, *self._back()]

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        return_tensors: str | None = None,
        padding: bool | str = False,
        truncation: bool | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
    ) -> BatchEncoding:
        """Encode one text or a batch into `input_ids` and `attention_mask`.

        Lists, or with `return_tensors="pt"` int64 tensors (rows, longest). `max_length` counts
        the special tokens and cuts each row's right end.

        Raises:
            UsageError: a wrong option, or rows of unequal length asked for as a tensor.
        """
        _check_options(return_tensors, padding, truncation, max_length)
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise UsageError("no text given", where="text")
        rows = [self.encode(one, add_special_tokens) for one in texts]
        if max_length is not None:
            front, back = (self._front(), self._back()) if add_special_tokens else ([], [])
            room = max(max_length, len(front) + len(back))
            rows = [row if len(row) <= room else row[: room - len(back)] + back for row in rows]
        masks = [[1] * len(row) for row in rows]
        if padding and len(rows) > 1:
            rows, masks = self._pad(rows)
        if return_tensors == "pt":
            return _tensors(rows, masks)
        if isinstance(text, str):
            return BatchEncoding(input_ids=rows[0], attention_mask=masks[0])
        return BatchEncoding(input_ids=rows, attention_mask=masks)

    def decode(
        self,
        ids: "int | Sequence[int] | Tensor",
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """The text of ids, as `sentencepiece` decodes them.

        The first piece loses the space that encoding put in front, and no other does. Control
        tokens are left out, or written where they stand: `<s> text</s> text`. (The slow tokenizer
        of transformers 4 moves those spaces about: `<s>text`, but `<s> text</s>text`.) A control
        token ends a byte sequence. Each broken byte gives one U+FFFD.

        Raises:
            UsageError: an id outside the vocabulary.
        """
        if clean_up_tokenization_spaces:
            raise _wrong("clean_up_tokenization_spaces", "False: it changes the text", True)
        stream = StreamDetokenizer(self, skip_special_tokens=skip_special_tokens)
        parts = [stream.put(i) for i in self._checked(ids)]
        return "".join(parts) + stream.end()

    def batch_decode(
        self,
        sequences: "Iterable[Sequence[int] | Tensor]",
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """`decode` of each row."""
        return [
            self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in sequences
        ]

    def apply_chat_template(
        self,
        messages: Sequence[chat_template.Message | Mapping[str, str]],
        tokenize: bool = True,
        return_tensors: str | None = None,
        add_generation_prompt: bool = True,
    ) -> "list[int] | str | Tensor":
        """Mixtral's [INST] format (see `qmix.text.chat_template`): ids, int64 (1, ids), or readable text.

        The format ends where the answer begins, so `add_generation_prompt` changes nothing. A
        chat_template of the checkpoint is a program and is not run.
        """
        _check_options(return_tensors, False, None, None)
        ids = chat_template.encode(messages, self)
        if not tokenize:
            return self.decode(ids)
        if return_tensors == "pt":
            tensor: Tensor = _tensors([ids], [[1] * len(ids)])["input_ids"]
            return tensor
        return ids

    def _read_pieces(self) -> Pieces:
        sp = self._sp
        size = sp.get_piece_size()
        names: list[str] = [sp.id_to_piece(i) for i in range(size)]
        texts = [name.replace(SPACE_MARK, " ") for name in names]
        controls = {i for i in range(size) if sp.is_control(i) or sp.is_unknown(i)}
        spaced = next((i for i, text in enumerate(texts) if text.startswith(" ")), None)
        for index, (content, special) in self._added_tokens(size).items():
            if index != len(names):
                raise self._bad_entry("added_tokens_decoder", f"{len(names)}: no gap", index)
            names.append(content)
            texts.append(content)
            if special:
                controls.add(index)
        return Pieces(
            names=tuple(names),
            texts=tuple(texts),
            bytes_by_id={i: int(names[i][1:-1], 16) for i in range(size) if sp.is_byte(i)},
            controls=frozenset(controls),
            drops_first_space=spaced is not None and sp.decode([spaced]) != texts[spaced],
        )

    def _added_tokens(self, size: int) -> dict[int, tuple[str, bool]]:
        """Tokens behind the model's own, as fine-tunes add them: id -> content, special."""
        entries = self._config.get("added_tokens_decoder", {})
        added: dict[int, tuple[str, bool]] = {}
        if not isinstance(entries, Mapping):
            raise self._bad_entry("added_tokens_decoder", "an object", entries)
        for key, entry in entries.items():
            if not (key.isascii() and key.isdigit() and len(key) < 9):
                raise self._bad_entry("added_tokens_decoder", "token ids as keys", key)
            if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
                raise self._bad_entry(
                    f"added_tokens_decoder.{key}", "an object with content", entry
                )
            if int(key) >= size:
                added[int(key)] = (entry["content"], entry.get("special") is True)
        return dict(sorted(added.items()))

    def _flag(self, name: str, default: bool) -> bool:
        value = self._config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._bad_entry(name, "true or false", value)
        return value

    def _special(self, name: str, own: int) -> int | None:
        """The id of a special token: as the config names it, or the model's own (-1: none)."""
        value = self._config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if value is None:
            return own if own >= 0 else None
        if not isinstance(value, str):
            raise self._bad_entry(name, "a string, or an object with content", value)
        if value not in self._ids:
            raise self._bad_entry(
                name, f"a token of {MODEL_FILE} or of added_tokens_decoder", value
            )
        return self._ids[value]

    def _bad_entry(self, name: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(
            "wrong value",
            where=f"{self._where}: {name}",
            expected=expected,
            found=repr(found)[:80],
            remedy="Correct it, or remove the entry.",
        )

    def _name(self, index: int | None) -> str | None:
        return None if index is None else self.pieces.names[index]

    def _front(self) -> list[int]:
        return [self.bos_token_id] if self.add_bos_token and self.bos_token_id is not None else []

    def _back(self) -> list[int]:
        return [self.eos_token_id] if self.add_eos_token and self.eos_token_id is not None else []

    def _pad(self, rows: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        pad = self.eos_token_id if self.pad_token_id is None else self.pad_token_id
        if pad is None:
            raise UsageError("the tokenizer has neither a pad nor an end token", where="padding")
        if self.padding_side not in ("left", "right"):
            raise _wrong("padding_side", "'left' or 'right'", self.padding_side)
        longest = max(map(len, rows))
        padded, masks = [], []
        for row in rows:
            blank, mask = longest - len(row), [1] * len(row)
            left = self.padding_side == "left"
            padded.append([pad] * blank + row if left else row + [pad] * blank)
            masks.append([0] * blank + mask if left else mask + [0] * blank)
        return padded, masks

    def _checked(self, ids: "int | Sequence[int] | Tensor") -> list[int]:
        """A flat list of ids, each inside the vocabulary."""
        listed = ids if isinstance(ids, (int, Sequence)) else ids.tolist()
        listed = [listed] if isinstance(listed, int) else list(listed)
        size = len(self)
        for index in listed:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < size:
                raise _wrong("ids", f"token ids from 0 to {size - 1}, one row", index)
        return listed


def _decoder(added: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`added_tokens.json` (content -> id) as the `added_tokens_decoder` that came after it."""
    for content, index in added.items():
        if type(index) is not int or index < 0:
            raise CheckpointError(
                f"token {content!r}: not an id", where=where, expected="a number", found=index
            )
    return {str(index): {"content": content, "special": True} for content, index in added.items()}


def _changes(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that change tokenizer_config.json; those without effect dropped."""
    for name in options:
        if name not in (*_ENTRIES, *_WITHOUT_EFFECT):
            raise UsageError(
                f"from_pretrained has no option {name!r}",
                expected=", ".join(("padding_side", *_ENTRIES)),
            )
    return {name: value for name, value in options.items() if name in _ENTRIES}


def _wrong(where: str, expected: str, found: object) -> UsageError:
    return UsageError("wrong value", where=where, expected=expected, found=repr(found)[:80])


def _check_options(
    return_tensors: str | None, padding: bool | str, truncation: bool | None, max_length: int | None
) -> None:
    if return_tensors not in (None, "pt"):
        raise _wrong("return_tensors", "'pt' or None", return_tensors)
    if padding not in (True, False, "longest"):
        raise _wrong("padding", "True, False or 'longest'", padding)
    if truncation not in (None, True, False):
        raise _wrong("truncation", "True or False", truncation)
    if max_length is None:
        if truncation:
            raise _wrong("max_length", "a number, because truncation=True", max_length)
    elif truncation is False:
        raise _wrong("truncation", "True, because max_length is given", truncation)
    elif isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise _wrong("max_length", "an integer of at least 1", max_length)


def _tensors(rows: list[list[int]], masks: list[list[int]]) -> BatchEncoding:
    import torch

    if len({len(row) for row in rows}) > 1:
        raise UsageError(
            "rows of unequal length do not make a tensor",
            where="return_tensors",
            remedy="Give padding=True.",
        )
    return BatchEncoding(
        input_ids=torch.tensor(rows, dtype=torch.int64),
        attention_mask=torch.tensor(masks, dtype=torch.int64),
    )
