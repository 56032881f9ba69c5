"""Text to ids and back with sentencepiece, from the `tokenizer.model` of a Mixtral checkpoint.

Calls have the form of Hugging Face's LlamaTokenizer. What a user types never becomes a control
token: `</s>` in a text is four ordinary characters. Knows nothing of models.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import sentencepiece

from qmix import strict_json
from qmix.errors import CheckpointError, UsageError, wrong_value
from qmix.files import atomic_file, regular_file
from qmix.gguf.files import is_gguf
from qmix.gguf.files import read_model as read_model_headers
from qmix.text import chat_template, gguf_vocabulary
from qmix.text.batch_encoding import (
    BatchEncoding,
    as_tensors,
    check_options,
    check_padding_side,
    pad,
)
from qmix.text.detokenizer import Pieces, StreamDetokenizer
from qmix.text.sentencepiece_file import MODEL_FILE, check_model, damaged, pieces, read_model
from qmix.text.tokenizer_config import CONFIG_FILE, TokenizerConfig, overrides, read_config
from qmix.text.vocabulary import ADDED_SCORE, CONTROL, USER_DEFINED, Vocabulary, model_bytes

if TYPE_CHECKING:
    from torch import Tensor

# sentencepiece's mark for a space inside a piece. Typed by a user it decodes to a space, so it is
# the one character that does not survive the round trip.
SPACE_MARK = "\u2581"
_MAX_PIECES = 1 << 18  # more than any published vocabulary


class LlamaTokenizer:
    """The tokenizer of a Mixtral checkpoint: byte-fallback BPE, in which no character is unknown.

    Args:
        model: the bytes of a `tokenizer.model`.
        config: the document of a `tokenizer_config.json`. add_bos_token, add_eos_token, the bos,
            eos, unk and pad tokens and added_tokens_decoder are read; other entries are kept.
        where: names the model file in errors.

    `padding_side` ("left" or "right") may be set. `pad_token_id` is None unless the config names
    one; batches are then padded with the end-of-sequence id.

    Raises:
        CheckpointError: the model or the config is damaged; the message names the file.
    """

    def __init__(
        self, model: bytes, config: Mapping[str, Any] | None = None, *, where: str = MODEL_FILE
    ) -> None:
        if not isinstance(model, bytes):
            raise wrong_value("model", f"the bytes of a {MODEL_FILE}", type(model).__name__)
        check_model(model, where)
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise damaged(where, str(error)[:120]) from None
        self._model = model
        self._config = TokenizerConfig(config or {}, str(Path(where).with_name(CONFIG_FILE)))
        try:
            self.pieces = _pieces(self._sp, self._config)
        except ValueError as error:  # UnicodeDecodeError is one
            raise damaged(where, str(error)[:120]) from None
        self._ids = {name: i for i, name in reversed(list(enumerate(self.pieces.names)))}
        self.padding_side = "left"
        self.add_bos_token = self._config.flag("add_bos_token", True)
        self.add_eos_token = self._config.flag("add_eos_token", False)
        special = self._config.special_token
        self.unk_token_id = special("unk_token", self._ids, self._sp.unk_id())
        self.bos_token_id = special("bos_token", self._ids, self._sp.bos_id())
        self.eos_token_id = special("eos_token", self._ids, self._sp.eos_id())
        self.pad_token_id = special("pad_token", self._ids, self._sp.pad_id())

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, padding_side: str = "left", **options: Any
    ) -> Self:
        """Read a checkpoint directory, a GGUF file, or a `tokenizer.model` file by its path.

        A `tokenizer_config.json` beside it is honoured. Where that lists no added tokens, so is the
        `added_tokens.json` of fine-tunes before 2024. No code is ever loaded.

        Args:
            padding_side: "left" or "right".
            options: entries that override tokenizer_config.json: add_bos_token, add_eos_token,
                bos_token, eos_token, unk_token, pad_token, model_max_length. Options of
                transformers that cannot change the ids here (use_fast, legacy, revision, ...) are
                accepted and have no effect.

        Raises:
            CheckpointError: a file is missing or damaged; the message names it.
            UsageError: an unknown option, or another padding_side.
        """
        changes = overrides(options)
        check_padding_side(padding_side)
        path = Path(path)
        tokenizer = cls._of_gguf(path, changes) if is_gguf(path) else cls._of_file(path, changes)
        tokenizer.padding_side = padding_side
        return tokenizer

    @classmethod
    def _of_gguf(cls, path: Path, changes: Mapping[str, Any]) -> Self:
        model = read_model_headers(path)
        where = str(model.path)
        vocabulary = gguf_vocabulary.vocabulary(model.metadata, where)
        settings = gguf_vocabulary.settings(model.metadata, where)
        return cls(model_bytes(vocabulary), {**settings, **changes}, where=where)

    @classmethod
    def _of_file(cls, path: Path, changes: Mapping[str, Any]) -> Self:
        file = path / MODEL_FILE if regular_file.is_folder(path) else path
        if not regular_file.exists(file) and regular_file.exists(path / "tokenizer.json"):
            raise CheckpointError(
                f"{MODEL_FILE} is missing",
                where=str(path),
                found="tokenizer.json, which qmix does not read",
                remedy=f"Copy {MODEL_FILE} from the original checkpoint into this directory.",
            )
        return cls(read_model(file), {**read_config(file), **changes}, where=str(file))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `tokenizer.model` byte for byte, and `tokenizer_config.json`.

        Raises:
            WriteError: the directory or a file cannot be written.
        """
        folder = atomic_file.made_folder(directory)
        # auto_map names code, which is not saved.
        entries = self._config.document.items()
        document = {key: value for key, value in entries if key != "auto_map"}
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
    def stored_template(self) -> str | None:
        """The template that the config brings along, which is kept and not run; None without."""
        template = self._config.document.get("chat_template")
        return template if isinstance(template, str) else None

    def vocabulary(self) -> Vocabulary:
        """All pieces with scores and types, added tokens last, as GGUF files hold them."""
        stored = pieces(self._model)
        added = range(len(stored), len(self))
        controls = self.pieces.controls
        types = [kind for _, _, kind in stored]
        types += [CONTROL if index in controls else USER_DEFINED for index in added]
        return Vocabulary(
            pieces=self.pieces.names,
            scores=[score for _, score, _ in stored] + [ADDED_SCORE] * len(added),
            types=types,
            bos=self.bos_token_id,
            eos=self.eos_token_id,
            unk=self.unk_token_id,
            space_prefix=self.pieces.drops_first_space,
            where=MODEL_FILE,
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids of `tokenizer.model`, without added tokens."""
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
        if token is not None and (not isinstance(token, str) or token not in self._ids):
            raise wrong_value("pad_token", "a token of the vocabulary", token)
        self.pad_token_id = None if token is None else self._ids[token]

    def get_vocab(self) -> dict[str, int]:
        """The id of every token by its name."""
        return dict(self._ids)

    def convert_ids_to_tokens(self, ids: "int | Sequence[int] | Tensor") -> str | list[str]:
        """The names of pieces: `▁My`, `<0x0A>`, `</s>`."""
        names = [self.pieces.names[i] for i in self._checked(ids)]
        return names[0] if isinstance(ids, int) else names

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int | None] | None:
        """The ids of pieces by name; an unknown name gives the unk id."""
        if isinstance(tokens, str):
            return self._ids.get(tokens, self.unk_token_id)
        if not isinstance(tokens, (list, tuple)) or not all(isinstance(t, str) for t in tokens):
            raise wrong_value("tokens", "a string, or a list of strings", tokens)
        return [self._ids.get(token, self.unk_token_id) for token in tokens]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; with `add_special_tokens` the BOS id comes first.

        Raises:
            UsageError: not a string, or a string that is not Unicode text (a lone surrogate).
        """
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
        ids: list[int] = self._sp.encode(text)
        if not add_special_tokens:
            return ids
        return [*self._prefix(), *ids, *self._suffix()]

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

        Returns lists, or with `return_tensors="pt"` int64 tensors (rows, longest). `max_length`
        counts the special tokens; longer rows lose their right end.

        Raises:
            UsageError: a wrong option, or a tensor requested of rows that differ in length.
        """
        check_options(return_tensors, padding, truncation, max_length)
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise UsageError("no text given", where="text")
        rows = [self.encode(each, add_special_tokens) for each in texts]
        if max_length is not None:
            rows = self._truncate(rows, max_length, add_special_tokens)
        masks = [[1] * len(row) for row in rows]
        if padding and len(rows) > 1:
            pad_token_id = self.eos_token_id if self.pad_token_id is None else self.pad_token_id
            rows, masks = pad(rows, pad_token_id, self.padding_side)
        if return_tensors == "pt":
            return as_tensors(rows, masks)
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

        The first piece loses the space that encoding put in front; no other piece does. Control
        tokens are left out, or written in their place: `<s> text</s> text`. (The slow tokenizer of
        transformers 4 places these spaces otherwise: `<s>text`, but `<s> text</s>text`.) A control
        token ends a byte sequence. Each broken byte gives one U+FFFD.

        Raises:
            UsageError: an id outside the vocabulary.
        """
        if clean_up_tokenization_spaces:
            raise wrong_value("clean_up_tokenization_spaces", "False: it changes the text", True)
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
        """Messages in Mixtral's [INST] format (see `qmix.text.chat_template`).

        The format ends where the answer begins, so `add_generation_prompt` has no effect. The
        checkpoint's own chat_template is a program and is not run.

        Returns:
            Ids, int64 ids (1, n) with `return_tensors="pt"`, or with `tokenize=False` the text.
        """
        check_options(return_tensors, False, None, None)
        ids = chat_template.encode(messages, self)
        if not tokenize:
            return self.decode(ids)
        if return_tensors == "pt":
            tensor: Tensor = as_tensors([ids], [[1] * len(ids)])["input_ids"]
            return tensor
        return ids

    def _name(self, index: int | None) -> str | None:
        return None if index is None else self.pieces.names[index]

    def _prefix(self) -> list[int]:
        return [self.bos_token_id] if self.add_bos_token and self.bos_token_id is not None else []

    def _suffix(self) -> list[int]:
        return [self.eos_token_id] if self.add_eos_token and self.eos_token_id is not None else []

    def _truncate(
        self, rows: list[list[int]], max_length: int, add_special_tokens: bool
    ) -> list[list[int]]:
        """Cut the right end of long rows, but leave their special tokens."""
        prefix, suffix = (self._prefix(), self._suffix()) if add_special_tokens else ([], [])
        longest = max(max_length, len(prefix) + len(suffix))
        return [
            row if len(row) <= longest else row[: longest - len(suffix)] + suffix for row in rows
        ]

    def _checked(self, ids: "int | Sequence[int] | Tensor") -> list[int]:
        """A flat list of ids, each inside the vocabulary."""
        if not isinstance(ids, (int, Sequence)) and not hasattr(ids, "tolist"):
            raise wrong_value("ids", "token ids", ids)
        listed = ids if isinstance(ids, (int, Sequence)) else ids.tolist()
        listed = [listed] if isinstance(listed, int) else list(listed)
        size = len(self)
        for index in listed:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < size:
                raise wrong_value("ids", f"token ids from 0 to {size - 1}, one row", index)
        return listed


def _pieces(sp: Any, config: TokenizerConfig) -> Pieces:
    """The pieces of a sentencepiece model, followed by the added tokens of its config."""
    size = sp.get_piece_size()
    if size > _MAX_PIECES:
        raise ValueError(f"{size} pieces")
    names: list[str] = [sp.id_to_piece(i) for i in range(size)]
    texts = [name.replace(SPACE_MARK, " ") for name in names]
    controls = {i for i in range(size) if sp.is_control(i) or sp.is_unknown(i)}
    spaced = next((i for i, text in enumerate(texts) if text.startswith(" ")), None)
    for text, special in config.added_tokens(size):
        if special:
            controls.add(len(names))
        names.append(text)
        texts.append(text)
    return Pieces(
        names=tuple(names),
        texts=tuple(texts),
        bytes_by_id={i: _byte(names[i]) for i in range(size) if sp.is_byte(i)},
        controls=frozenset(controls),
        drops_first_space=spaced is not None and sp.decode([spaced]) != texts[spaced],
    )


def _byte(name: str) -> int:
    """The byte of a byte piece, such as <0x0A>."""
    value = int(name[1:-1], 16)
    if name != f"<0x{value:02X}>" or value > 255:
        raise ValueError(f"the byte piece {name[:40]!r}")
    return value
