"""The files of a tokenizer in a checkpoint's folder: which there are, and which one is used.

`tokenizer.json` counts before `tokenizer.model`, as in transformers. Knows nothing of texts.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmix.errors import UnsupportedError
from qmix.files import regular_file
from qmix.gguf.files import is_gguf
from qmix.gguf.files import read_model as read_model_headers
from qmix.text import chat_templates, gguf_vocabulary
from qmix.text.sentencepiece_backend import SentencePieceBackend
from qmix.text.sentencepiece_file import MODEL_BYTES, MODEL_FILE, read_model
from qmix.text.tokenizer_config import CONFIG_FILE, TokenizerConfig, read_config
from qmix.text.tokenizers_backend import JSON_FILE, TokenizersBackend
from qmix.text.vocabulary import model_bytes

# Texts in which two tokenizers of one vocabulary may differ: the space in front, several spaces, a
# newline, digits, other scripts, what is no letter. None begins with a space: the v3 tokenizer's
# two files differ there, and transformers leaves it so.
_PROBE = ("Hello there", "two  spaces", "line\n\n  def f(x): 2024", "Größe 你好 🙂", "[INST] a")


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What was read of a folder, ready to be saved again.

    Attributes:
        model: the bytes of `tokenizer.model`, if there is one.
        json: the bytes of `tokenizer.json`, if there is one.
        config: the document of `tokenizer_config.json`.
        templates: the chat templates that have files of their own, by name.
        where: names the folder or the file in errors.
    """

    model: bytes | None = None
    json: bytes | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    where: str = MODEL_FILE

    @property
    def checked_config(self) -> TokenizerConfig:
        """The config, checked as it is read."""
        return TokenizerConfig(self.config, str(Path(self.where).with_name(CONFIG_FILE)))

    def chat_templates(self) -> dict[str, str]:
        """The templates by name; those with files of their own count before the config's.

        Raises:
            CheckpointError: the entry of the config is wrong.
        """
        if self.templates:
            return dict(self.templates)
        where = str(Path(self.where).with_name(CONFIG_FILE))
        entry = self.config.get(chat_templates.TEMPLATE_ENTRY)
        return chat_templates.of_entry(entry, f"{where}: {chat_templates.TEMPLATE_ENTRY}")

    def backend(self) -> SentencePieceBackend | TokenizersBackend:
        """What encodes.

        Raises:
            CheckpointError: a file is damaged.
            UnsupportedError: a kind of vocabulary that is not read.
        """
        config = self.checked_config
        if self.json is None:
            assert self.model is not None, "one of both is there"
            return SentencePieceBackend(self.model, config, where=self.where)
        tokens = (config.added_tokens(), config.special_tokens())
        added = [token for each in tokens for token in each.values()]
        where = str(Path(self.where).with_name(JSON_FILE))
        backend = TokenizersBackend(
            self.json, [*added, *config.extra_special_tokens()], where=where
        )
        if self.model is not None:
            self._compare(backend, where)
        return backend

    def _compare(self, used: TokenizersBackend, where: str) -> None:
        """Warn if the `tokenizer.model` beside `tokenizer.json` gives other ids."""
        assert self.model is not None
        other = SentencePieceBackend(self.model, TokenizerConfig({}, ""), where=self.where)
        for text in _PROBE:
            if used.encode(text, match="none") != other.encode(text, match="none"):
                warnings.warn(
                    f"{where} and {MODEL_FILE} disagree, for example on {text!r}: "
                    f"{JSON_FILE} is used, as in transformers",
                    stacklevel=2,
                )
                return


def read_folder(path: Path) -> TokenizerFiles:
    """The tokenizer's files in a folder, or beside a `tokenizer.model` given by its path.

    Raises:
        CheckpointError: there is no tokenizer, or a file is too large or damaged.
    """
    folder = path if regular_file.is_folder(path) else path.parent
    json: Path | None = folder / JSON_FILE
    model: Path | None = folder / MODEL_FILE
    if folder != path:
        json, model = (path, None) if path.name == JSON_FILE else (None, path)
    elif not regular_file.exists(folder / JSON_FILE):
        json = None
    elif not regular_file.exists(folder / MODEL_FILE):
        model = None
    return TokenizerFiles(
        model=None if model is None else read_model(model),
        json=None if json is None else regular_file.read(json, limit_bytes=MODEL_BYTES),
        config=read_config(folder),
        templates=chat_templates.read_files(folder),
        where=str(model or json),
    )


def read_gguf(path: Path) -> TokenizerFiles:
    """The tokenizer and the chat templates inside a GGUF file.

    Raises:
        CheckpointError: it is damaged.
        UnsupportedError: another kind of vocabulary than Mixtral's.
    """
    model = read_model_headers(path)
    where = str(model.path)
    vocabulary = gguf_vocabulary.vocabulary(model.metadata, where)
    config = gguf_vocabulary.settings(model.metadata, where)
    return TokenizerFiles(model=model_bytes(vocabulary), config=config, where=where)


def read_files(path: Path) -> TokenizerFiles:
    """The tokenizer of a checkpoint: a folder, a GGUF file, or a `tokenizer.model` itself."""
    return read_gguf(path) if is_gguf(path) else read_folder(path)


def no_scores(where: str) -> UnsupportedError:
    """The error for a tokenizer that is to become part of a GGUF file, and has no scores."""
    return UnsupportedError(
        f"a GGUF file needs the scores of {MODEL_FILE}",
        where=where,
        found=f"{JSON_FILE} alone",
        remedy=f"Copy {MODEL_FILE} from the original checkpoint into this directory.",
    )
