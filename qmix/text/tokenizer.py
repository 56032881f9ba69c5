"""Text to ids and back, from the tokenizer's files in a Mixtral checkpoint.

Calls have the form of Hugging Face's tokenizers, and give the same ids. Knows nothing of models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qmix import strict_json
from qmix.errors import UsageError, wrong_value
from qmix.files import atomic_file
from qmix.hub.remote import HubOptions
from qmix.hub.source import resolve
from qmix.text import chat_template, chat_templates, tokenizer_files
from qmix.text.batch_encoding import BatchEncoding, EncodingOptions, check_side
from qmix.text.sentencepiece_file import MODEL_FILE, pieces
from qmix.text.token_table import TokenTable
from qmix.text.tokenizer_config import CONFIG_FILE, overrides
from qmix.text.tokenizer_files import TokenizerFiles
from qmix.text.tokenizers_backend import JSON_FILE, TokenizersBackend
from qmix.text.vocabulary import ADDED_SCORE, CONTROL, USER_DEFINED, Vocabulary

if TYPE_CHECKING:
    from torch import Tensor


class LlamaTokenizer(TokenTable):
    """The tokenizer of a Mixtral checkpoint: for most, a BPE that knows every character.

    Args:
        model: the bytes of a `tokenizer.model`, or all files of a tokenizer.
        config: the document of a `tokenizer_config.json`, beside bytes. Entries that are not read
            are kept.
        where: names the model file in errors, beside bytes.

    `padding_side`, `truncation_side` ("left" or "right"), `model_max_length`, `add_bos_token`,
    `add_eos_token` and the special tokens may be set. `pad_token_id` is None unless the config
    names one; batches are then padded with the end-of-sequence id.

    Raises:
        CheckpointError: a file is damaged; the message names it.
        UnsupportedError: a `tokenizer.json` of a kind that is not read.
    """

    def __init__(
        self,
        model: bytes | TokenizerFiles,
        config: Mapping[str, Any] | None = None,
        *,
        where: str = MODEL_FILE,
    ) -> None:
        if isinstance(model, bytes):
            model = TokenizerFiles(model=model, config=dict(config or {}), where=where)
        if not isinstance(model, TokenizerFiles):
            raise wrong_value("model", f"the bytes of a {MODEL_FILE}", type(model).__name__)
        self._files = model
        self._backend = model.backend()
        entries = model.checked_config
        super().__init__(self._backend, entries)
        self.padding_side = entries.side("padding_side", "left")
        self.truncation_side = entries.side("truncation_side", "right")
        self.model_max_length = entries.model_max_length
        self.split_special_tokens = entries.flag("split_special_tokens", False)
        self._before, self._after = self._around(entries.flag)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Self:
        """Read a checkpoint directory, a GGUF file, a `tokenizer.model` file, or a name of the hub.

        `tokenizer.json` counts before `tokenizer.model`, as in transformers; a warning says so if
        the two disagree. `tokenizer_config.json` beside them is honoured, and where it lists no
        added tokens, `special_tokens_map.json` and `added_tokens.json`. No code is ever loaded.

        Args:
            options: entries that override tokenizer_config.json: add_bos_token, add_eos_token,
                bos_token, eos_token, unk_token, pad_token, padding_side, truncation_side,
                model_max_length, chat_template, ... Options of transformers that cannot change the
                ids here (use_fast, legacy, revision, ...) are accepted and have no effect.

        Raises:
            CheckpointError: a file is missing or damaged; the message names it.
            UnsupportedError: a `tokenizer.json` of a kind that is not read.
            UsageError: an unknown option, or another padding_side.
        """
        hub = HubOptions.taken(options)
        changes = overrides(options)
        for name in ("padding_side", "truncation_side"):
            if name in changes:
                check_side(name, changes[name])
        path = resolve(path, need="tokenizer", options=hub)
        files = tokenizer_files.read_files(path)
        tokenizer = cls(replace(files, config={**files.config, **changes}))
        if files.json is not None:  # its own post-processor counts before the config, in 5
            for name in {"add_bos_token", "add_eos_token"} & set(changes):
                setattr(tokenizer, name, changes[name])
        return tokenizer

    def save_pretrained(self, directory: str | Path, **options: Any) -> None:
        """Write the tokenizer's files byte for byte, and `tokenizer_config.json`.

        Raises:
            UsageError: an option; push_to_hub is for the hub's own tools.
            WriteError: the directory or a file cannot be written.
        """
        if options.get("push_to_hub"):
            raise UsageError(
                "qmix does not write to the hub",
                where="push_to_hub",
                remedy="Save, then run `hf upload` on the directory.",
            )
        folder = atomic_file.made_folder(directory)
        # auto_map names code, which is not saved.
        entries = self._files.config.items()
        document = {key: value for key, value in entries if key != "auto_map"}
        document.update(
            tokenizer_class=document.get("tokenizer_class") or "LlamaTokenizer",
            add_bos_token=self.add_bos_token,
            add_eos_token=self.add_eos_token,
            **{
                name: self._kept(document.get(name), getattr(self, name))
                for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            },
        )
        if self._files.model is not None:
            atomic_file.write(folder / MODEL_FILE, self._files.model)
        if self._files.json is not None:
            atomic_file.write(folder / JSON_FILE, self._json())
        for name, text in self._files.templates.items():
            atomic_file.write(folder / chat_templates.file_of(name), text.encode())
        strict_json.write(folder / CONFIG_FILE, dict(sorted(document.items())))

    def vocabulary(self) -> Vocabulary:
        """All pieces with scores and types, added tokens last, as GGUF files hold them.

        Raises:
            UnsupportedError: there is no `tokenizer.model`, whose scores a GGUF file needs.
        """
        if self._files.model is None:
            raise tokenizer_files.no_scores(self._files.where)
        stored = pieces(self._files.model)
        names, controls = self.pieces.names, self.pieces.controls
        above = range(len(stored), len(names))
        types = [kind for _, _, kind in stored]
        types += [CONTROL if index in controls else USER_DEFINED for index in above]
        return Vocabulary(
            pieces=names,
            scores=[score for _, score, _ in stored] + [ADDED_SCORE] * len(above),
            types=types,
            bos=self.bos_token_id,
            eos=self.eos_token_id,
            unk=self.unk_token_id,
            space_prefix=self.pieces.drops_first_space,
            where=MODEL_FILE,
        )

    @property
    def name_or_path(self) -> str:
        """The folder or the file that it was read from."""
        where = Path(self._files.where)
        return str(where if where.suffix == ".gguf" else where.parent)

    @property
    def is_fast(self) -> bool:
        """Whether it was read from `tokenizer.json`."""
        return self._files.json is not None

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

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, "
            f"vocab_size={self.vocab_size}, model_max_length={self.model_max_length}, "
            f"padding_side={self.padding_side!r}, truncation_side={self.truncation_side!r}, "
            f"special_tokens={self.special_tokens_map}, added_tokens={self.get_added_vocab()})"
        )

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
    ) -> BatchEncoding:
        """Encode one text or a batch into `input_ids` and `attention_mask`.

        Returns lists, or with `return_tensors="pt"` or "np" int64 arrays (rows, longest).
        `max_length` counts the special tokens; by default it is `model_max_length`.

        Raises:
            UsageError: a wrong option, or a tensor requested of rows that differ in length.
        """
        if max_length is None and self._states_length and (truncation or padding == "max_length"):
            max_length = self.model_max_length
        options = EncodingOptions(
            return_tensors=return_tensors,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=self.padding_side if padding_side is None else padding_side,
            truncation_side=self.truncation_side,
        )
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
        options = EncodingOptions(
            return_tensors=return_tensors,
            padding=padding,
            max_length=max_length,
            padding_side=self.padding_side if padding_side is None else padding_side,
        )
        return options.batch([self._checked(row) for row in rows], self._padding_id)

    @property
    def stored_template(self) -> str | None:
        """The chat template that the checkpoint brings along for a chat; None without."""
        return self.chat_templates.get(chat_templates.DEFAULT)

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The checkpoint's chat templates by name; files of their own count before the config."""
        if self._files.templates:
            return self._files.templates
        entry = self._files.config.get(chat_templates.TEMPLATE_ENTRY)
        return chat_templates.of_entry(entry, f"{self._files.where}: chat_template")

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
        ids = chat_template.encode(messages, self)
        if not tokenize:
            return self.decode(ids)
        if return_tensors is None:
            return ids
        tensor: Tensor = EncodingOptions(return_tensors=return_tensors).batch([ids], None)[
            "input_ids"
        ]
        return tensor

    @property
    def _padding_id(self) -> int | None:
        return self.eos_token_id if self.pad_token_id is None else self.pad_token_id

    @property
    def _states_length(self) -> bool:
        return self.model_max_length < int(1e20)

    def _ordinary(self, text: str, split: bool | None) -> list[int]:
        """The ids of a text without what goes around it."""
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
        split = self.split_special_tokens if split is None else split
        return self._backend.encode(text, match="not special" if split else "all")

    def _around(self, flag: Any) -> tuple[list[int], list[int]]:
        """The ids before and after a text: of `tokenizer.json` itself, or as the config says."""
        if isinstance(self._backend, TokenizersBackend):
            return self._backend.before, self._backend.after
        before = self._one("bos_token", flag("add_bos_token", True), [])
        return before, self._one("eos_token", flag("add_eos_token", False), [])

    def _one(self, name: str, adds: bool, present: list[int]) -> list[int]:
        if not isinstance(adds, bool):
            raise wrong_value(f"add_{name}", "True or False", adds)
        if not adds:
            return []
        index = self._special.get(name)
        return present or ([] if index is None else [index])

    def _json(self) -> bytes:
        """The bytes of `tokenizer.json`, changed only if what goes around a text was."""
        assert self._files.json is not None
        assert isinstance(self._backend, TokenizersBackend)
        if (self._before, self._after) == (self._backend.before, self._backend.after):
            return self._files.json
        names = self.pieces.names
        return self._backend.saved(
            {names[index]: index for index in self._before},
            {names[index]: index for index in self._after},
        )

    def _kept(self, entry: object, token: str | None) -> object:
        """An entry as it was written, if it still names the token."""
        if isinstance(entry, Mapping) and entry.get("content") == token:
            return dict(entry)
        return token
