"""The name of a model on the hub, as people write it.

`ORG/NAME`, `ORG/NAME@REVISION`, `hf://ORG/NAME`, or a page's address; of a repository of GGUF files
also `ORG/NAME:Q4_K_M` or `ORG/NAME/FILE.gguf`. Knows no network.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from qmix.errors import UsageError

_WORD = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_REVISION = r"refs/(?:pr/\d+|convert/[\w.-]+)|[\w.-]+"
_ID = re.compile(
    rf"(?P<name>{_WORD}/{_WORD})(?:@(?P<revision>{_REVISION}))?"
    r"(?::(?P<quant>\w[\w.-]*)|/(?P<file>[\w./-]+\.gguf))?",
    re.ASCII,
)
_PAGE = re.compile(
    rf"(?P<name>{_WORD}/{_WORD})(?:/(?:tree|blob|resolve)/(?P<revision>{_REVISION})"
    r"(?:/(?P<file>[\w./-]+\.gguf))?)?/?",
    re.ASCII,
)
# A Path has one slash where an address has two.
_SCHEME = re.compile(r"hf:/+(?:models/)?")
_ADDRESS = re.compile(r"https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/(?:models/)?")
_ANY_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:/+")
_FILES = (".gguf", ".json", ".safetensors", ".bin", ".pt", ".pth", ".model", ".txt")


@dataclass(frozen=True)
class RepoId:
    """A repository of a model.

    Attributes:
        name: ORG/NAME.
        revision: a branch, a tag or a commit; None: the main branch.
        quant: which of its GGUF models, by a part of the file's name.
        file: which, by the file.
    """

    name: str
    revision: str | None = None
    quant: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @property
    def folder_name(self) -> str:
        """Of its folder in the hub's cache."""
        return f"models--{self.name.replace('/', '--')}"

    @classmethod
    def parse(cls, source: str | Path) -> "RepoId | None":
        """The repository that a text names; None if it is written as a path of this machine.

        Raises:
            UsageError: an address that is none of a model on the hub.
        """
        text = str(source)
        if match := _SCHEME.match(text):
            found = _ID.fullmatch(text[match.end() :])
        elif match := _ADDRESS.match(text):
            found = _PAGE.fullmatch(text[match.end() :])
        elif _ANY_SCHEME.match(text):
            found = None
        elif text.endswith(_FILES) and text.count("/") < 2:
            return None
        else:
            found = _ID.fullmatch(text)
            if found is None or not _is_name(found["name"]):
                return None
        if found is None or not _is_name(found["name"]):
            raise UsageError(
                "not the name of a model on the hub",
                where=text[:200],
                expected="ORG/NAME, ORG/NAME@REVISION, hf://ORG/NAME or its page's address",
            )
        return cls(**found.groupdict())


def _is_name(name: str) -> bool:
    """Whether the hub allows the name; datasets and spaces have names of another form."""
    organisation, _, model = name.partition("/")
    return (
        len(name) <= 96
        and not {"--", ".."} & {name[at : at + 2] for at in range(len(name))}
        and not model.endswith((".git", ".ipynb"))
        and organisation not in ("datasets", "spaces", "buckets", "kernels")
    )
