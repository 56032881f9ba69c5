"""Seeded damage to JSON documents and byte strings; the oracle is: read, or QmixError."""

import copy
import json
import random

from qmix.errors import QmixError

# What a program may write where something else is expected.
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 1 << 31, (1 << 31) - 1, 1 << 63, -(1 << 63)),
    *(1 << 70, 10**30, 10**400, -(10**400), -0.0, 0.0, 0.5, 1.5, 1e300, -1e-300, 1e-320),
    *("", "1", "a", "mixtral", "\0", "\x1b]0;x\x07", "\u202e", "A" * 300, "../x", "/etc/passwd"),
    *("\ud800", "\ufdd0", "true", "NaN", "1e999", "float16", "\U0001f680", "</s>", "<unk>"),
    *([], [None], [1], [[1]], [-1], [1 << 70], [1.5], ["a"], [[]], ["a"] * 300, [0] * 3000),
    *({}, {"a": 1}, {"": None}, {"content": "</s>"}, {"content": None}, {"A" * 300: []}),
)
KEYS = (
    "",
    "a",
    "\0",
    "\x1b[31m",
    "\u202e",
    "A" * 300,
    "self",
    "extra",
    "__class__",
    "__deepcopy__",
)


def mutated_document(document, rng, more=()):
    """A copy of a JSON document with one to three places changed, or an entry of `more` added."""
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        place = rng.choice(list(_containers(document)))
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        action = rng.choice(("value", "value", "value", "delete", "add", "rename", "nest"))
        if action == "add" or not keys:
            _add(place, rng, more if place is document else ())
            continue
        key = rng.choice(keys)
        if action == "delete":
            del place[key]
        elif action == "rename" and isinstance(place, dict):
            place[rng.choice((*KEYS, *map(str, keys)))] = place.pop(key)
        elif action == "nest":
            for _ in range(rng.choice((1, 2, 60, 300))):
                place[key] = [place[key]]
        else:
            place[key] = copy.deepcopy(rng.choice(VALUES))
    return document


def mutated_text(document, rng, more=()):
    """A mutated document as text; one in eight is damaged as text too."""
    text = json.dumps(mutated_document(document, rng, more))
    if rng.random() < 1 / 8:
        return mutated_bytes(text.encode(), rng)
    return text.encode()


def mutated_bytes(data, rng):
    """A copy with some bytes flipped, cut, repeated, inserted or removed."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.choice((1, 1, 2, 8, 100)))
        action = rng.choice(("set", "set", "set", "remove", "insert", "repeat", "cut"))
        if action == "set":
            data[start:stop] = rng.choice((b"\xff", b"\0", b"\x80", rng.randbytes(stop - start)))
        elif action == "remove":
            del data[start:stop]
        elif action == "insert":
            data[start:start] = rng.randbytes(stop - start)
        elif action == "repeat":
            data[start:start] = data[start:stop] * rng.choice((1, 2, 50))
        elif rng.random() < 0.2:
            del data[start:]
    return bytes(data)


def outcome(work):
    """ "read" or "refused"; any other exception is a failure of the test that asks."""
    try:
        work()
    except QmixError as error:
        line = str(error)
        assert line.isprintable(), ascii(line)
        return "refused"
    return "read"


def generator(*seed):
    return random.Random(repr(seed))


def _containers(value):
    if isinstance(value, (dict, list)):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)


def _add(place, rng, more):
    value = copy.deepcopy(rng.choice(VALUES))
    if isinstance(place, dict):
        place[rng.choice(tuple(more) or KEYS)] = value
    else:
        place.append(value)
