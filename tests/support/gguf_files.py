"""Small GGUF files, written field by field so that a test can make any of them wrong."""

import struct

from qmix.formats.gguf.tensor_types import TYPES

NUMBERS = {kind.name: number for number, kind in TYPES.items()}
STRING, ARRAY = 8, 9


def string(text):
    """A string with its length; bytes are written as they are."""
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(item):
    """A value with its type: integers as uint32, floats as float32, of lists by the first item."""
    if isinstance(item, bytes):  # made by the caller
        return item
    if isinstance(item, (list, tuple)):
        kind, _ = scalar(item[0]) if item else (STRING, b"")
        data = b"".join(scalar(one)[1] for one in item)
        return struct.pack("<IIQ", ARRAY, kind, len(item)) + data
    kind, data = scalar(item)
    return struct.pack("<I", kind) + data


def scalar(item):
    """(type, bytes) of one value; negative integers are int32."""
    if isinstance(item, bool):
        return 7, bytes([item])
    if isinstance(item, str):
        return STRING, string(item)
    if isinstance(item, float):
        return 6, struct.pack("<f", item)
    return (5, struct.pack("<i", item)) if item < 0 else (4, struct.pack("<I", item))


def gguf_bytes(metadata, tensors, *, version=3, alignment=32, counts=None):
    """A whole file.

    Args:
        metadata: key -> value; see `value`.
        tensors: name -> (type, shape outermost first, bytes).
        counts: (tensors, keys) that the header claims; None: what there is.
    """
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(metadata))))
    keys = b"".join(string(key) + value(item) for key, item in metadata.items())
    entries, data = b"", b""
    for name, (kind, shape, raw) in tensors.items():
        entries += string(name) + struct.pack("<I", len(shape))
        entries += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        entries += struct.pack("<IQ", NUMBERS.get(kind, kind), len(data))
        data += raw + bytes(-len(raw) % alignment)
    header = head + keys + entries
    return header + bytes(-len(header) % alignment) + data
