"""A Python function as a tool's JSON schema, from its type hints and its Google docstring.

The schema is the one of transformers' `get_json_schema`. Functions are read, never called.
"""

import inspect
import json
import re
import types
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qmix.errors import UsageError

_SECTION = re.compile(r"^(Args|Returns|Raises):\s*$", re.MULTILINE)
_ARGUMENT = re.compile(r"^([ \t]*)(\w+):[ \t]*", re.MULTILINE)
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)
_SCALARS: Mapping[object, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
}
_PLAIN: Mapping[object, dict[str, Any]] = {
    **{kind: {"type": name} for kind, name in _SCALARS.items()},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function.

    Raises:
        UsageError: no docstring, an argument without a hint or a description, or a hint that JSON
            does not have; the error names the function and the argument.
    """
    name = getattr(function, "__name__", "operation")
    sections = _sections(inspect.getdoc(function) or "")
    if not any(sections.values()):
        raise _missing(name, "a docstring")
    described = _arguments(sections.get("Args", ""))
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError) as error:
        raise UsageError("the type hints cannot be read", where=name, found=str(error)) from None
    properties: dict[str, Any] = {}
    required = []
    for index, (argument, parameter) in enumerate(inspect.signature(function).parameters.items()):
        if index == 0 and argument in ("self", "cls") and argument not in hints:
            continue
        where = f"{name}({argument})"
        if argument not in hints:
            raise _missing(where, "a type hint")
        if argument not in described:
            raise _missing(where, "a line under Args: in the docstring")
        if parameter.default is inspect.Parameter.empty:
            required.append(argument)
        properties[argument] = _described(_of_hint(hints[argument], where), described[argument])
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    schema = {"name": name, "description": sections[""].strip(), "parameters": parameters}
    if "return" in hints:
        try:
            returned = _of_hint(hints["return"], name)
        except UsageError:
            return {"type": "function", "function": schema}
        said = sections.get("Returns", "").strip()
        schema["return"] = {**returned, **({"description": said} if said else {})}
    return {"type": "function", "function": schema}


def _sections(text: str) -> dict[str, str]:
    """The parts of a docstring by their headings; the first has none."""
    parts = _SECTION.split(text)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def _arguments(text: str) -> dict[str, str]:
    """The descriptions under Args: by name, each in one line."""
    lines = [line for line in text.split("\n") if line.strip()]
    text = "\n".join(lines)
    found = list(_ARGUMENT.finditer(text))
    if not found:
        return {}
    outer = [match for match in found if len(match[1]) <= len(found[0][1])]
    ends = [match.start() for match in outer[1:]] + [len(text)]
    return {
        match[2]: re.sub(r"\s*\n+\s*", " ", text[match.end() : end].strip())
        for match, end in zip(outer, ends, strict=True)
    }


def _described(schema: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The schema of an argument with its description, whose choices are an enum."""
    choices = _CHOICES.search(text)
    if choices is None:
        return {**schema, "description": text}
    try:
        values = json.loads(choices[1])
    except ValueError:
        raise UsageError("the choices are not JSON", found=choices[1][:80]) from None
    enum = [value.strip() if isinstance(value, str) else value for value in values]
    return {**schema, "enum": enum, "description": text[: choices.start()].strip()}


def _of_hint(hint: Any, where: str) -> dict[str, Any]:
    """The schema of a type hint."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is None and isinstance(hint, type) and issubclass(hint, Enum):
        return _enum([member.value for member in hint], where)
    if origin is None and hint in _PLAIN:
        return dict(_PLAIN[hint])
    if origin is Literal:
        return _enum(list(inner), where)
    if origin in (Union, types.UnionType):
        return _of_union(inner, where)
    if origin is list:
        return {"type": "array", "items": _of_hint(inner[0], where)}
    if origin is tuple and len(inner) > 1 and ... not in inner:
        return {"type": "array", "prefixItems": [_of_hint(each, where) for each in inner]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of_hint(inner[1], where)}
    raise UsageError(
        "this type hint has no JSON schema",
        where=where,
        found=str(hint)[:80],
        remedy="Give the schema itself instead of the function.",
    )


def _of_union(inner: tuple[Any, ...], where: str) -> dict[str, Any]:
    kinds = [_of_hint(each, where) for each in inner if each is not type(None)]
    if len(kinds) == 1:
        schema = kinds[0]
    elif all(set(kind) == {"type"} for kind in kinds):
        names = sorted({kind["type"] for kind in kinds})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": kinds}
    return {**schema, "nullable": True} if type(None) in inner else schema


def _enum(values: list[Any], where: str) -> dict[str, Any]:
    if not values or any(type(value) not in _SCALARS for value in values):
        raise UsageError("these values are not JSON's", where=where, found=str(values)[:80])
    names = list(dict.fromkeys(_SCALARS[type(value)] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}


def _missing(where: str, what: str) -> UsageError:
    return UsageError(f"a tool needs {what}", where=where)
