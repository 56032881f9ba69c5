"""Headers that lie, and files that are no safetensors files, are refused by name."""

import json
import struct

import pytest

from qmix.errors import CheckpointError
from qmix.formats.files.shard_index import read_headers


def header(path, document, data=b""):
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

BAD_HEADERS = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "header longer than file": struct.pack("<Q", 1000) + b"{}",
    "enormous header": struct.pack("<Q", 2**63) + b"{}",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n" + b" " * 64,
    "html": b"<!doctype html><html>" + b" " * 64,
    "zip": b"PK\x03\x04" + b" " * 64,
    "pickle": b"\x80\x02}q\x00." + b" " * 64,
    "gzip": b"\x1f\x8b\x08" + b" " * 64,
}
BAD_DOCUMENTS = {
    "not an object": (b"[1]", b""),
    "leading space": (b' {"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "truncated data": ({"a": F32}, b"123"),
    "trailing byte": ({"a": F32}, b"12345"),
    "unknown dtype": ({"a": {**F32, "dtype": "F8_X"}}, b"1234"),
    "negative offset": ({"a": {**F32, "data_offsets": [-4, 0]}}, b"1234"),
    "float offset": ({"a": {**F32, "data_offsets": [0, 4.0]}}, b"1234"),
    "bool shape": ({"a": {**F32, "shape": [True]}}, b"1234"),
    "reversed offsets": ({"a": {**F32, "data_offsets": [4, 0]}}, b"1234"),
    "shape mismatch": ({"a": {**F32, "shape": [2]}}, b"1234"),
    "overflowing shape": ({"a": {**F32, "shape": [2**61, 2**61]}}, b"1234"),
    "extra field": ({"a": {**F32, "offset": 1}}, b"1234"),
    "hole": ({"a": {**F32, "data_offsets": [4, 8]}}, b"12345678"),
    "overlap": ({"a": F32, "b": {**F32, "data_offsets": [2, 6]}}, b"123456"),
    "duplicate tensor": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"1234",
    ),
    "number metadata": ({"__metadata__": {"a": 1}, "a": F32}, b"1234"),
    "bad utf-8": (b'{"\xff":{}}', b""),
    "deep nesting": (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", b""),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_files_that_are_no_safetensors_are_named(tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes(BAD_HEADERS[name])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_headers(tmp_path)


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_headers_that_lie_are_refused(tmp_path, name):
    header(tmp_path / "model.safetensors", *BAD_DOCUMENTS[name])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_headers(tmp_path)


@pytest.mark.parametrize("length", [0x280, 0x8B1F, 0x3C + 256])
def test_a_header_length_may_look_like_another_formats_first_bytes(tmp_path, length):
    raw = json.dumps({"a": F32}).encode().ljust(length)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + raw + b"1234")
    assert read_headers(tmp_path).keys() == {"a"}
