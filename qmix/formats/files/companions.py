"""The files beside the weights that a new checkpoint takes over unchanged: tokenizer and templates.

Knows nothing of what they hold.
"""

from pathlib import Path

from qmix.files import atomic_file, regular_file
from qmix.files.file_errors import writing
from qmix.gguf.files import is_gguf
from qmix.text.chat_templates import TEMPLATE_FILE, TEMPLATE_FOLDER
from qmix.text.tokenizer import LlamaTokenizer

NAMES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    TEMPLATE_FILE,
)
MAX_BYTES = 64 << 20


def present(folder: Path) -> tuple[str, ...]:
    """The names of the companions that a folder has, those of its templates with their folder."""
    names = [name for name in NAMES if regular_file.exists(folder / name)]
    if regular_file.is_folder(folder / TEMPLATE_FOLDER):
        with regular_file.reading(folder / TEMPLATE_FOLDER):
            more = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
        names += [f"{TEMPLATE_FOLDER}/{file.name}" for file in more]
    return tuple(names)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the companions that `source` has into `folder`; of a GGUF file, write its tokenizer.

    Raises:
        CheckpointError: one is too large or cannot be read.
        WriteError: one cannot be written.
    """
    if is_gguf(source):
        LlamaTokenizer.from_pretrained(source).save_pretrained(folder)
        return
    for name in present(source):
        if "/" in name:
            atomic_file.made_folder((folder / name).parent)
        if regular_file.exists(source / name):
            data = regular_file.read(source / name, limit_bytes=MAX_BYTES)
            with writing(folder / name):
                (folder / name).write_bytes(data)
