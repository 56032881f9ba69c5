"""Tensors that lie together are read together, through the page cache or past it."""

import errno
import mmap
import os

import pytest
import torch
from safetensors.torch import save_file

from qmix.errors import CheckpointError
from qmix.formats.files import large_reads
from qmix.formats.files.page_cache import cached_pages
from qmix.formats.files.shards import read_entries
from qmix.formats.files.spans import in_turn, read_span, spans

NAMES = ("a", "b", "c")


@pytest.fixture
def file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": 200_003 * 4, "b": 8, "c": 300_000}
    tensors = {
        name: torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        for name, size in sizes.items()
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return path, tensors


def pages_of(span):
    memory = mmap.mmap(-1, span.nbytes)  # it begins on a page
    return torch.frombuffer(memory, dtype=torch.uint8)


def drop(path):
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("past_cache", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_a_span_holds_the_bytes_of_its_tensors(file, monkeypatch, past_cache, cached):
    monkeypatch.setattr(large_reads, "_PIECE_BYTES", 1 << 16)
    path, tensors = file
    entries = read_entries(path)
    ((span, within),) = spans(entries)
    assert sorted(within) == sorted(NAMES)
    if not cached:
        drop(path)
    pages = pages_of(span)
    read_span(span, "it", pages, in_turn, past_cache=past_cache)
    for name in within:
        start = entries[name].start - span.first
        assert torch.equal(pages[start : start + entries[name].nbytes], tensors[name])


def test_what_other_tensors_part_is_two_spans_and_short_runs_are_none(file):
    path, _ = file
    entries = read_entries(path)
    middle = sorted(entries.items(), key=lambda item: item[1].start)[1][0]
    rest = {name: entry for name, entry in entries.items() if name != middle}
    assert sorted(len(within) for _, within in spans(rest)) in ([1], [1, 1])
    assert spans({"b": entries["b"]}) == []


def test_where_a_file_cannot_be_read_past_the_cache_it_is_read_through_it(file, monkeypatch):
    path, tensors = file
    entries = read_entries(path)
    ((span, _),) = spans(entries)
    preadv, refused = os.preadv, []

    def refuse(descriptor, buffers, offset):
        if descriptor in direct:
            refused.append(offset)
            raise OSError(errno.EINVAL, "not here")
        return preadv(descriptor, buffers, offset)

    direct, opening = set(), os.open

    def opened(name, flags, *rest, **options):
        descriptor = opening(name, flags, *rest, **options)
        if flags & large_reads._DIRECT:
            direct.add(descriptor)
        return descriptor

    drop(path)
    monkeypatch.setattr(os, "preadv", refuse)
    monkeypatch.setattr(os, "open", opened)
    pages = pages_of(span)
    read_span(span, "it", pages, in_turn, past_cache=True)
    assert refused or not direct
    start = entries["a"].start - span.first
    assert torch.equal(pages[start : start + entries["a"].nbytes], tensors["a"])


@pytest.mark.parametrize("past_cache", [False, True])
def test_a_file_that_has_become_shorter_is_an_error(file, past_cache):
    path, _ = file
    ((span, _),) = spans(read_entries(path))
    os.truncate(path, span.stop - 5000)
    with pytest.raises(CheckpointError, match=r"safetensors: it ends early"):
        read_span(span, "it", pages_of(span), in_turn, past_cache=past_cache)
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        read_span(span, "it", pages_of(span), in_turn, past_cache=past_cache)


def test_the_page_cache_is_asked_without_a_read(file):
    path, _ = file
    with path.open("rb") as stream:
        size = path.stat().st_size
        stream.read()
        held = cached_pages(stream.fileno(), 0, size)
        assert len(held) == -(-size // mmap.PAGESIZE)
        assert set(held) <= {0, 1}
        drop(path)
        assert sum(cached_pages(stream.fileno(), 0, size)) <= sum(held)
    assert not any(cached_pages(-1, 0, 5000))
