"""Text to ids and back, from the tokenizer's files in a Mixtral checkpoint.

Calls have the form of Hugging Face's tokenizers, and give the same ids. Knows nothing of models.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from qmix import strict_json
from qmix.errors import QmixError, UsageError, wrong_value
from qmix.files import atomic_file
from qmix.hub.remote import HubOptions
from qmix.hub.source import resolve
from qmix.text import chat_templates, tokenizer_files
from qmix.text.batch_encoding import check_side
from qmix.text.chat_encoder import ChatEncoder
from qmix.text.sentencepiece_file import MODEL_FILE, pieces
from qmix.text.tokenizer_config import CONFIG_FILE, overrides
from qmix.text.tokenizer_files import TokenizerFiles
from qmix.text.tokenizers_backend import JSON_FILE, TokenizersBackend
from qmix.text.vocabulary import ADDED_SCORE, CONTROL, USER_DEFINED, Vocabulary


class LlamaTokenizer(ChatEncoder):
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
        super().__init__(model.backend(), model.checked_config, model.chat_templates())

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
        if chat_templates.TEMPLATE_ENTRY in changes:
            files = replace(files, templates={})
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
        templates = self._files.templates
        if self._templates != self._files.chat_templates():
            templates = {}
            document[chat_templates.TEMPLATE_ENTRY] = chat_templates.entry(self._templates)
        for name, text in templates.items():
            file = folder / chat_templates.file_of(name)
            atomic_file.made_folder(file.parent)
            atomic_file.write(file, text.encode())
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

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, "
            f"vocab_size={self.vocab_size}, model_max_length={self.model_max_length}, "
            f"padding_side={self.padding_side!r}, truncation_side={self.truncation_side!r}, "
            f"special_tokens={self.special_tokens_map}, added_tokens={self.get_added_vocab()})"
        )

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


def tokenizer_problem(path: Path) -> str | None:
    """Why a checkpoint's tokenizer cannot be used; None if it can."""
    try:
        LlamaTokenizer.from_pretrained(path)
    except QmixError as error:
        return str(error)
    return None
