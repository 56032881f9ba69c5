"""JSON schemas drawn from a number: nested, bounded, recursive, with words of many scripts."""

import random

WORDS = [
    "list",
    "größe",
    "名前",
    "naïve café",
    "☺",
    'a"b\\c',
    "линия",
    "x/y",
    "",
    "1e5",
    "مرحبا",
    "e\u0301",
]
NAMES = ["id", "name", "größe", "値", "kind", "a b", "tag-1", "ключ", "$x", "parts"]
PATTERNS = [
    "^[a-c]{1,3}$",
    "^\\d{4}-\\d{2}$",
    "^(ja|nein|☺)$",
    "^[^\\s]{2,5}$",
    "^v[0-9]+\\.[0-9]{1,2}$",
]
FORMATS = ["uuid", "ipv4", "time"]  # Python knows no year 0000, which a date may have


def json_schema(index):
    """The schema of a number, an object with a few properties."""
    draw = random.Random(index)
    schema = _object(draw, 3)
    if index % 5 == 0:
        schema["properties"]["next"] = {"$ref": "#/$defs/node"}
        schema["$defs"] = {"node": _node(draw)}
    return schema


def _node(draw):
    """A list or a tree that refers to itself."""
    value = _scalar(draw)
    itself = {"$ref": "#/$defs/node"}
    if draw.random() < 0.5:
        properties = {"value": value, "next": {"anyOf": [{"type": "null"}, itself]}}
        return {"type": "object", "properties": properties, "required": ["value", "next"],
                "additionalProperties": False}  # fmt: skip
    properties = {"value": value, "left": itself}
    return {"type": "object", "properties": properties, "required": ["value"],
            "additionalProperties": False}  # fmt: skip


def _any(draw, depth):
    if depth and draw.random() < 0.45:
        return draw.choice([_object, _array, _one_of])(draw, depth - 1)
    return _scalar(draw)


def _object(draw, depth):
    names = draw.sample(NAMES, draw.randint(1, 3))
    digit = {"type": "integer", "minimum": 0, "maximum": 9}
    more = {"patternProperties": {"^n[0-9]$": digit}} if draw.random() < 0.2 else {}
    return {
        **more,
        "type": "object",
        "properties": {name: _any(draw, depth) for name in names},
        "required": [name for name in names if draw.random() < 0.7],
        "additionalProperties": digit if draw.random() < 0.04 else False,
    }


def _array(draw, depth):
    least = draw.randint(0, 2)
    array = {"type": "array", "items": _any(draw, depth), "minItems": least,
             "maxItems": least + draw.randint(0, 2)}  # fmt: skip
    if draw.random() < 0.2:
        return {"type": "array", "prefixItems": [_scalar(draw), _scalar(draw)], "items": False,
                "minItems": 2}  # fmt: skip
    return array


def _one_of(draw, depth):
    return {"anyOf": [_any(draw, depth), {"type": "null"}, {"const": draw.choice(WORDS)}]}


def _scalar(draw):
    return draw.choice([_text, _text, _integer, _number, _enum, _const, _flag])(draw)


def _text(draw):
    kind = draw.randrange(4)
    if kind == 0:
        return {"type": "string", "pattern": draw.choice(PATTERNS)}
    if kind == 1:
        return {"type": "string", "format": draw.choice(FORMATS)}
    least = draw.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 8)}


def _integer(draw):
    least = draw.randint(-200, 200)
    schema = {"type": "integer", "minimum": least, "maximum": least + draw.randint(0, 1000)}
    if draw.random() < 0.2:
        schema = {"type": "integer", "exclusiveMinimum": least, "exclusiveMaximum": least + 50}
    if draw.random() < 0.2:
        schema = {"type": "integer", "multipleOf": draw.choice([2, 5, 10]), "minimum": 0,
                  "maximum": 1000}  # fmt: skip
    return schema


def _number(draw):
    least = round(draw.uniform(-10, 10), 2)
    name = draw.choice(["maximum", "exclusiveMaximum"])
    return {"type": "number", "minimum": least, name: round(least + draw.uniform(0.5, 100), 1)}


def _enum(draw):
    return {"enum": draw.sample([*WORDS, 1, -2.5, True, None, [1], {"a": "☺"}], draw.randint(1, 5))}


def _const(draw):
    return {"const": draw.choice([*WORDS, 0, False, None, [], {"größe": [1, "x"]}])}


def _flag(draw):
    return {"type": draw.choice(["boolean", ["boolean", "null"]])}
