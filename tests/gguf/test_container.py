"""GGUF headers: what is read, and what is refused."""

import random
import struct
import tracemalloc
from array import array

import pytest

from qmix.errors import CheckpointError, QmixError, UnsupportedError
from qmix.gguf.container import read_gguf
from tests.support.gguf_files import gguf_bytes, string
from tests.support.promptness import within

METADATA = {
    "general.architecture": "llama",
    "general.alignment": 64,
    "a.float": 1.5,
    "a.flag": True,
    "a.negative": -7,
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "Ünï"],
    "tokenizer.ggml.scores": [0.0, -1.5, 2.0, 0.25],
    "a.flags": [True, False],
}
TENSORS = {
    "token_embd.weight": ("F16", (4, 3), bytes(range(24))),
    "blk.0.attn_q.weight": ("Q4_0", (2, 64), bytes(72)),
}


def written(tmp_path, metadata=METADATA, tensors=TENSORS, **options):
    path = tmp_path / "m.gguf"
    alignment = metadata.get("general.alignment", 32)
    options.setdefault("alignment", alignment if isinstance(alignment, int) else 32)
    path.write_bytes(gguf_bytes(metadata, tensors, **options))
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_and_places_of_tensors(tmp_path, version):
    path = written(tmp_path, version=version)
    read = read_gguf(path)
    assert dict(read.metadata) == {
        **METADATA,
        "tokenizer.ggml.tokens": tuple(METADATA["tokenizer.ggml.tokens"]),
        "tokenizer.ggml.scores": array("f", METADATA["tokenizer.ggml.scores"]),
        "a.flags": array("B", [1, 0]),
    }
    assert read.metadata["a.flag"] is True
    assert read.alignment == 64
    embedding, query = read.tensors.values()
    assert (embedding.type, embedding.shape) == ("F16", (4, 3))
    assert (query.type, query.shape) == ("Q4_0", (2, 64))
    assert path.read_bytes()[embedding.start : embedding.stop] == bytes(range(24))
    assert query.start % 64 == 0
    assert query.stop - query.start == 72


def test_the_padding_after_the_last_tensor_may_be_missing(tmp_path):
    path = written(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: read_gguf(path).tensors["blk.0.attn_q.weight"].stop])
    assert len(read_gguf(path).tensors) == 2


def claim(name="t", dimensions=None, sizes=(32,), kind=0, offset=0):
    dimensions = len(sizes) if dimensions is None else dimensions
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", dimensions, *sizes, kind, offset)


def with_claims(*claims, data=128):
    header = b"GGUF" + struct.pack("<IQQ", 3, len(claims), 0) + b"".join(claims)
    return header + bytes(-len(header) % 32) + bytes(data)


def with_value(raw, key="k"):
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string(key) + raw


def with_key(length):
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, length) + bytes(20)


HUGE = 1 << 63
WRONG = {
    "empty": (b"", "not a GGUF file"),
    "ends after the magic": (b"GGUF", "the version"),
    "another format": (b"GGML" + bytes(60), "not a GGUF file"),
    "unknown version": (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "unknown GGUF version"),
    "2^63 tensors": (gguf_bytes({}, {}, counts=(HUGE, 0)), f"number of tensors is {HUGE}"),
    "2^63 keys": (gguf_bytes({}, {}, counts=(0, HUGE)), f"number of keys is {HUGE}"),
    "2^64 - 1 keys": (gguf_bytes({}, {}, counts=(0, 2 * HUGE - 1)), "number of keys"),
    "a key past the end": (with_key(99), "length of a key is 99"),
    "a key of 2^63 bytes": (with_key(HUGE), "length of a key"),
    "a string past the end": (with_value(struct.pack("<IQ", 8, 1000)), "the value of k is 1000"),
    "a string of 2^63 bytes": (with_value(struct.pack("<IQ", 8, HUGE)), "the value of k is"),
    "a string not in UTF-8": (with_value(struct.pack("<I", 8) + string(b"\xff\xfe")), "UTF-8"),
    "an array of 2^63 numbers": (with_value(struct.pack("<IIQ", 9, 4, HUGE)), "the value of k"),
    "an array of 2^62 strings": (with_value(struct.pack("<IIQ", 9, 8, HUGE >> 1)), "of k is"),
    "an array of arrays": (
        with_value(struct.pack("<IIQ", 9, 9, 1) * 40),
        "an array of arrays",
    ),
    "an array of an unknown type": (with_value(struct.pack("<IIQ", 9, 77, 1)), "unknown type"),
    "a value of an unknown type": (with_value(struct.pack("<I", 13)), "unknown type"),
    "a number that ends early": (with_value(struct.pack("<I", 10) + bytes(3)), "the value of k"),
    "a flag of 2": (with_value(struct.pack("<IB", 7, 2)), "no flag"),
    "a key twice": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + (string("k") + struct.pack("<IB", 0, 1)) * 2,
        "a key stands twice",
    ),
    "alignment 0": (gguf_bytes({"general.alignment": 0}, {}), "general.alignment"),
    "alignment 48": (gguf_bytes({"general.alignment": 48}, {}), "general.alignment"),
    "alignment 2^31": (gguf_bytes({"general.alignment": 1 << 31}, {}), "general.alignment"),
    "alignment 'a'": (gguf_bytes({"general.alignment": "a"}, {}), "general.alignment"),
    "alignment true": (gguf_bytes({"general.alignment": True}, {}), "general.alignment"),
    "a tensor twice": (with_claims(claim(), claim()), "a tensor stands twice"),
    "a tensor of no dimension": (with_claims(claim(sizes=())), "number of dimensions"),
    "a tensor of 2^32 - 1 dimensions": (
        with_claims(claim(dimensions=-1 % (1 << 32))),
        "dimensions",
    ),
    "an empty tensor": (with_claims(claim(sizes=(32, 0))), "empty"),
    "a tensor of 2^126 values": (with_claims(claim(sizes=(HUGE, HUGE))), "larger than the file"),
    "a tensor of an unknown type": (with_claims(claim(kind=5)), "unknown type"),
    "a row of half a block": (with_claims(claim(sizes=(48, 2), kind=2)), "wrong shape for Q4_0"),
    "a tensor past the end": (with_claims(claim(offset=1 << 40)), "a gap or overlap"),
    "an offset of 2^64 - 1": (with_claims(claim(offset=2 * HUGE - 1)), "a gap or overlap"),
    "a tensor at half the alignment": (with_claims(claim(offset=16)), "a gap or overlap"),
    "overlapping tensors": (with_claims(claim("a"), claim("b", offset=64)), "overlap before b"),
    "a gap": (with_claims(claim("a"), claim("b", offset=256), data=512), "gap or overlap before b"),
    "a file that is too short": (with_claims(claim(), data=127), "1 B short"),
    "a file that is too long": (with_claims(claim(), data=161), "33 B too many"),
    "a name that drives the terminal": (with_claims(claim("\x1b]0;x", kind=5)), r"\x1b]0;x"),
}


def refused(path, size):
    """The error of a file; it comes at once, and without memory for what the header claims."""
    tracemalloc.start()
    try:
        with within(1), pytest.raises(QmixError) as error:
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20, size
    finally:
        tracemalloc.stop()
    return error.value


@pytest.mark.parametrize("case", WRONG)
def test_a_header_that_is_wrong(tmp_path, case):
    raw, message = WRONG[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    error = refused(path, len(raw))
    assert isinstance(error, CheckpointError)
    assert message in str(error)
    assert str(path) in str(error)
    assert "\x1b" not in str(error)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<III", 1, 0, 0), "version 1"),
    ],
)
def test_files_that_are_named_and_not_read(tmp_path, raw, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with pytest.raises(UnsupportedError, match=message):
        read_gguf(path)


def test_500_mutated_headers(tmp_path):
    """Each is read or refused by one error of qmix, in under a second and in little memory."""
    rng = random.Random(16)
    path = written(tmp_path)
    whole = path.read_bytes()
    header = read_gguf(path).tensors["token_embd.weight"].start
    extremes = (0, 1, 13, 255, 1 << 16, (1 << 31) - 1, 1 << 32, HUGE - 1, HUGE, 2 * HUGE - 1)
    results = {"read": 0, "refused": 0}
    for _ in range(500):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(4, header)
            action = rng.choice(("flip", "extreme", "cut", "remove", "repeat"))
            if action == "flip":
                raw[min(place, len(raw) - 1)] ^= 1 << rng.randrange(8)
            elif action == "extreme":
                size = rng.choice((4, 8))
                packed = (rng.choice(extremes) % (1 << 8 * size)).to_bytes(size, "little")
                raw[place : place + size] = packed
            elif action == "cut":
                del raw[place:]
                raw += bytes(1)
            elif action == "remove":
                del raw[place : place + rng.randint(1, 16)]
            else:
                raw[place:place] = raw[place : place + rng.randint(1, 64)]
        path.write_bytes(raw)
        tracemalloc.start()
        try:
            with within(1):
                read_gguf(path)
            results["read"] += 1
        except QmixError as error:
            results["refused"] += str(path) in str(error)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 1 << 20
    assert sum(results.values()) == 500, "an error that does not name the file"
    assert results["refused"] > 300, results
