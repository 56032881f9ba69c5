"""The text that every Python installation carries: pydoc's topics and the library's docstrings.

`python -m qmix.evals.corpus train|heldout` writes one part to stdout and its SHA-256 to stderr. The
text changes with the Python version, even with the patch release, so quote `fingerprint()` with
every figure. Knows nothing of tokens or models, and imports no torch.
"""

import ast
import builtins
import cmath
import functools
import hashlib
import inspect
import itertools
import math
import re
import sys
import sysconfig
import time
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qmix.errors import CheckpointError, UsageError
from qmix.evals.command import exit_code, say

HELDOUT_PERMILLE = 70
PARAGRAPH_CHARS = 60  # shorter paragraphs ("Returns a string.") recur naturally and stay
SEPARATOR = "\n\n\n"  # between documents; inside a document there is at most one blank line

# Not part of every installation (Debian splits some off, 3.12 and 3.13 dropped some), or not prose.
_SKIPPED_FOLDERS = re.compile(
    r"__phello__|__pycache__|config-.*|dist-packages|distutils|encodings|ensurepip|idlelib|lib-dynload"
    r"|lib2to3|msilib|pydoc_data|site-packages|tests?|tkinter|turtledemo"
)
_SKIPPED_FILES = ("sitecustomize.py", "_sysconfigdata", "_distutils_system_mod.py")
_C_MODULES: tuple[types.ModuleType, ...] = (builtins, cmath, itertools, math, time)
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One topic (`topic:assert`) or one object with its members (`doc:argparse.ArgumentParser`)."""

    name: str
    text: str

    @property
    def heldout(self) -> bool:
        """Whether it is held out. The name alone decides, so it is the same in every Python."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:8], "big") % 1000 < HELDOUT_PERMILLE

    @property
    def paragraphs(self) -> list[str]:
        """The text, split at blank lines."""
        return _BLANK_LINES.split(self.text)


def paragraph_key(paragraph: str) -> str:
    """A key that two paragraphs share if only their indentation or line breaks differ."""
    return " ".join(paragraph.split())


@functools.cache
def documents() -> tuple[Document, ...]:
    """Every document in order of names.

    Each long paragraph occurs once, and none of the held-out ones in a training document.
    """
    by_name = {d.name: d for d in (*_topics(), *_library(), *_c_objects())}
    everything = [by_name[name] for name in sorted(by_name)]
    heldout = list(_without_repeats([d for d in everything if d.heldout], set()))
    keys = {key for d in heldout for key in map(paragraph_key, d.paragraphs) if _is_long(key)}
    training = list(_without_repeats([d for d in everything if not d.heldout], keys))
    return tuple(sorted([*heldout, *training], key=lambda d: d.name))


def training_documents() -> tuple[Document, ...]:
    """The documents of the training text."""
    return tuple(d for d in documents() if not d.heldout)


def heldout_documents() -> tuple[Document, ...]:
    """The documents of the held-out text."""
    return tuple(d for d in documents() if d.heldout)


def training_text() -> str:
    """The text on which models and tokenizers are trained, and quantizers calibrated."""
    return _joined(training_documents())


def training_parts(count: int) -> tuple[str, ...]:
    """The training text in `count` parts of about one length that have no document in common."""
    documents = training_documents()
    return tuple(_joined(documents[index::count]) for index in range(count))


def heldout_text() -> str:
    """The text on which models are scored; the training text repeats none of its paragraphs."""
    return _joined(heldout_documents())


def fingerprint(text: str) -> str:
    """SHA-256 of a text, which tells whether two figures were measured on the same text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _joined(chosen: Iterable[Document]) -> str:
    return SEPARATOR.join(d.text for d in chosen) + "\n"


def _is_long(key: str) -> bool:
    return len(key) >= PARAGRAPH_CHARS


def _without_repeats(chosen: list[Document], seen: set[str]) -> Iterator[Document]:
    """Drop every long paragraph that came before, or that equals or contains one of `seen`."""
    forbidden = frozenset(seen)
    seen = set(seen)
    for document in chosen:
        remaining = []
        for paragraph in document.paragraphs:
            key = paragraph_key(paragraph)
            if _is_long(key):
                if key in seen or any(other in key for other in forbidden):
                    continue
                seen.add(key)
            remaining.append(paragraph)
        if len(remaining) > 1:  # a name alone, or a title with its underline, is not a document
            yield replace(document, text="\n\n".join(remaining))


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data import topics
    except ImportError:
        raise CheckpointError(
            "this Python has no pydoc_data",
            where=sys.executable,
            expected="the standard library's pydoc_data.topics",
            remedy="Use a full CPython (Debian: the package libpython3-stdlib).",
        ) from None
    for name, text in topics.topics.items():
        yield Document(name=f"topic:{name}", text=text.expandtabs().strip())


def _library() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    if not (root / "argparse.py").is_file():
        raise CheckpointError(
            "the standard library's sources are missing",
            where=str(root),
            expected="a folder of .py files",
            remedy="Use a CPython whose library is not in a zip file.",
        )
    for path in _sources(root):
        parts = list(path.relative_to(root).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        module = ".".join(parts)
        tree = ast.parse(path.read_bytes(), filename=str(path))
        doc = ast.get_docstring(tree)
        if doc:
            yield Document(name=f"doc:{module}", text=f"{module}\n\n{doc.expandtabs().strip()}")
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                entries = list(_docstrings(node, f"{module}.{node.name}"))
                if entries:
                    yield Document(name=f"doc:{module}.{node.name}", text="\n\n".join(entries))


def _sources(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if not _SKIPPED_FOLDERS.fullmatch(path.name) and (path / "__init__.py").is_file():
                yield from _sources(path)
        elif path.suffix == ".py" and not path.name.startswith(_SKIPPED_FILES):
            yield path


def _docstrings(
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[str]:
    """`name(arguments)` and its docstring, then the same for the members of a class."""
    doc = ast.get_docstring(node)
    if doc:
        head = name if isinstance(node, ast.ClassDef) else f"{name}({ast.unparse(node.args)})"
        yield f"{head}\n\n{doc.expandtabs().strip()}"
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if isinstance(member, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(member, f"{node.name}.{member.name}")


def _c_objects() -> Iterator[Document]:
    """Objects written in C, which have no source to parse, from modules of every CPython."""
    for module in _C_MODULES:
        for name, thing in sorted(vars(module).items()):
            # `site` adds exit, help and others, which are no types; an alias belongs to its own
            # name.
            if (
                not isinstance(thing, type | types.BuiltinFunctionType)
                or thing.__name__ != name
                or not thing.__doc__
            ):
                continue
            full = name if module is builtins else f"{module.__name__}.{name}"
            entries = [f"{full}\n\n{inspect.cleandoc(thing.__doc__).expandtabs().strip()}"]
            if isinstance(thing, type):
                entries += _c_members(thing)
            yield Document(name=f"doc:{full}", text="\n\n".join(entries))


def _c_members(owner: type) -> Iterator[str]:
    for name, member in sorted(vars(owner).items()):
        doc = getattr(member, "__doc__", None)
        # Slots ("Return str(self).") have the same docstring on every type.
        if callable(member) and isinstance(doc, str) and doc and not name.startswith("__"):
            yield f"{owner.__name__}.{name}\n\n{inspect.cleandoc(doc).expandtabs().strip()}"


def _print(arguments: Sequence[str]) -> None:
    parts = {"train": training_text, "heldout": heldout_text}
    if len(arguments) != 1 or arguments[0] not in parts:
        words = " ".join(arguments) or "nothing"
        raise UsageError("name one part", expected="train or heldout", found=words)
    text = parts[arguments[0]]()
    sys.stdout.buffer.write(text.encode())
    say(f"{len(text.encode())} bytes, sha256 {fingerprint(text)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_code("corpus", lambda: _print(given))


if __name__ == "__main__":
    sys.exit(main())
