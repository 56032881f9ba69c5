"""The program that renders chat templates, in a process of its own with limits on time and memory.

A template is somebody else's program. jinja2's sandbox keeps it from Python's internals, but not
from looping, nor from making a string of gigabytes: that is left to the system's limits.

Run in a worker_process.py. Imports nothing of qmix.
"""

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

CPU_SECONDS = 2
MEMORY_BYTES = 512 << 20
OUTPUT_CHARACTERS = 16 << 20


class Generation(Extension):
    """`{% generation %}` marks an answer in training templates; its text stands as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


class TemplateDict:
    """The `dict` of a template: transformers', which has no attributes to climb."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class TemplateNamespace(Namespace):
    """The `namespace` of a template: transformers', without names that begin with `_`."""

    def __init__(*args: Any, **attributes: Any) -> None:
        for name in dict(*args[1:], **attributes):
            _check_name(name)
        Namespace.__init__(*args, **attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace keeps no attribute {name!r}")


def _raise_exception(message: str) -> None:
    raise Refusal(message)


class Refusal(jinja2.TemplateError):
    """What a template says with raise_exception."""


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(maxsize=4)
def compiled(source: str) -> tuple[jinja2.Template, bool]:
    """A template, and whether it goes through the parts of a message's content."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=TemplateDict(),
        namespace=TemplateNamespace,
    )
    loops = environment.parse(source).find_all(nodes.For)
    takes_parts = any(_is_content(loop.iter) for loop in loops)
    return environment.from_string(source), takes_parts


def _is_content(node: nodes.Node) -> bool:
    """Whether an expression is a message's content."""
    if isinstance(node, nodes.Filter) and node.node is not None:
        return _is_content(node.node)
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name.endswith("content")


def rendered(request: Mapping[str, Any]) -> str:
    """The text of a conversation. A list of text parts is joined for templates that take text."""
    template, takes_parts = compiled(request["template"])
    variables = dict(request["variables"])
    if not takes_parts:
        variables["messages"] = [_joined(message) for message in variables["messages"]]
    pieces, size = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > OUTPUT_CHARACTERS:
            raise Refusal(f"the text has more than {OUTPUT_CHARACTERS} characters")
    return "".join(pieces)


def _joined(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    if not isinstance(content, list) or not all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a request: the text, or what went wrong."""
    try:
        return {"text": rendered(request)}
    except Refusal as refusal:
        return {"refused": str(refusal.message or "")[:400]}
    except jinja2.TemplateSyntaxError as error:
        return {"syntax": f"line {error.lineno}: {str(error.message or '')[:200]}"}
    except MemoryError:
        return {"failed": f"more than {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:  # noqa: BLE001 - whatever a template brings about
        return {"failed": f"{type(error).__name__}: {str(error)[:200].rstrip('.')}"}
