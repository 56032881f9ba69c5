"""Keys and values in a folder: what is found again, what is refused, and what is thrown away."""

import os
import stat
import time

import pytest
import torch

from qmix.errors import WriteError
from qmix.generation.config import GenerationConfig
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import stream
from qmix.generation.prompt_cache import PromptCache, checkpoint_name
from tests.support.models import ids, small_model

TEXT = ids(60)[0].tolist()


def read(model, text):
    """A cache that holds a text."""
    cache = model.new_cache(1)
    model.next_logits(torch.tensor([text]), cache)
    return cache


def files(folder):
    return sorted(folder.glob("*.safetensors"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "prompts"


def same(one, other):
    assert one.length == other.length
    for ours, theirs in zip(one, other, strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("window", [None, 24, 90])
def test_a_text_goes_on_from_what_was_stored(folder, window):
    model = small_model(sliding_window=window)
    kept = read(model, TEXT)
    assert PromptCache(folder, "m").store(kept, TEXT)
    cache = model.new_cache(1)
    longer = [*TEXT, 9, 8, 7]
    assert PromptCache(folder, "m").restore(cache, longer) == 60
    same(cache, kept)
    config = GenerationConfig(max_new_tokens=12)
    inputs = GenerationInputs(torch.tensor([longer]), config, cache=cache)
    found = [int(token.ids) for token in stream(model, inputs)]
    assert found == model.generate(torch.tensor([longer]), max_new_tokens=12)[0, 63:].tolist()


def test_the_longest_common_beginning_is_taken_and_one_id_is_left(folder):
    model = small_model()
    prompts = PromptCache(folder, "m")
    prompts.store(read(model, TEXT), TEXT)
    prompts.store(read(model, [*TEXT[:40], 5, 5]), [*TEXT[:40], 5, 5])
    assert len(files(folder)) == 2
    for text, length in (
        (TEXT, 59),
        ([*TEXT[:50], 4, 4], 50),
        ([*TEXT[:40], 5, 5, 5], 42),
        ([*TEXT[:31], 4], 0),  # too short to be worth it
        ([4, *TEXT], 0),
    ):
        cache = model.new_cache(1)
        assert prompts.restore(cache, text) == length
        if length:
            same(cache, read(model, text[:length]))


def test_a_file_that_gives_little_more_than_the_cache_has_is_not_read(folder):
    model = small_model()
    prompts = PromptCache(folder, "m")
    prompts.store(read(model, TEXT), TEXT)
    longer = [*TEXT, 9]
    for held, length in ((28, 60), (29, 0), (60, 0)):
        cache = read(model, TEXT[:held])
        assert prompts.restore(cache, longer, held) == length
        assert cache.length == (length or held)


def test_a_full_ring_serves_only_what_goes_on_where_it_ended(folder):
    model = small_model(sliding_window=24)
    prompts = PromptCache(folder, "m")
    prompts.store(read(model, TEXT), TEXT)
    assert prompts.restore(model.new_cache(1), [*TEXT[:50], 4]) == 0
    assert prompts.restore(model.new_cache(1), [*TEXT, 4]) == 60


def test_a_longer_text_takes_the_place_of_its_beginning_and_none_is_kept_twice(folder):
    model = small_model()
    prompts = PromptCache(folder, "m")
    assert prompts.store(read(model, TEXT[:40]), TEXT[:40])
    assert prompts.store(read(model, TEXT), TEXT)
    assert len(files(folder)) == 1
    assert not prompts.store(read(model, TEXT), TEXT)
    assert not prompts.store(read(model, TEXT[:45]), TEXT[:45])
    assert not prompts.store(read(model, TEXT[:9]), TEXT[:9])
    assert len(files(folder)) == 1


def test_other_models_and_other_kinds_of_caches_do_not_see_it(folder):
    model = small_model()
    PromptCache(folder, "m").store(read(model, TEXT), TEXT)
    assert PromptCache(folder, "n").restore(model.new_cache(1), [*TEXT, 1]) == 0
    for other in (small_model().bfloat16(), small_model(sliding_window=90)):
        assert PromptCache(folder, "m").restore(other.new_cache(1), [*TEXT, 1]) == 0


def test_a_flipped_byte_anywhere_is_a_miss_and_the_file_goes(folder):
    model = small_model(num_hidden_layers=1)
    prompts = PromptCache(folder, "m")
    prompts.store(read(model, TEXT[:33]), TEXT[:33])
    (path,) = files(folder)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in (0, 7, 9, header // 2, header - 1, header, header + 999, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        cache = model.new_cache(1)
        assert prompts.restore(cache, [*TEXT[:33], 1]) == 0
        assert cache.length == 0
    path.write_bytes(whole[:-5])
    assert prompts.restore(model.new_cache(1), [*TEXT[:33], 1]) == 0
    path.write_bytes(whole)
    assert prompts.restore(model.new_cache(1), [*TEXT[:33], 1]) == 33


def test_only_its_owner_can_read_it(folder):
    model = small_model()
    before = os.umask(0o022)
    try:
        PromptCache(folder, "m").store(read(model, TEXT), TEXT)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in files(folder)] == [0o600]
    folder.chmod(0o777)
    with pytest.raises(WriteError, match="others can write"):
        PromptCache(folder, "m")


def test_what_is_unused_for_longest_makes_room(folder):
    model = small_model()
    texts = [ids(40, seed=seed)[0].tolist() for seed in range(4)]
    PromptCache(folder, "m").store(read(model, texts[0]), texts[0])
    size = files(folder)[0].stat().st_size
    prompts = PromptCache(folder, "m", limit_bytes=3 * size)
    for age, text in enumerate(texts[1:3]):
        prompts.store(read(model, text), text)
        for path in files(folder):
            os.utime(path, (time.time() - 100 + 10 * age,) * 2)
    assert prompts.restore(model.new_cache(1), [*texts[0], 1]) == 40  # used: it stays
    left = folder / "left.writing"
    left.write_bytes(b"")
    os.utime(left, (0, 0))
    prompts.store(read(model, texts[3]), texts[3])
    assert not left.exists()
    assert len(files(folder)) == 3
    found = [prompts.restore(model.new_cache(1), [*text, 1]) for text in texts]
    assert found[0] == found[3] == 40
    assert sorted(found) == [0, 40, 40, 40]
    assert not PromptCache(folder, "m", limit_bytes=size // 2).store(read(model, TEXT), TEXT)


def test_a_write_that_fails_leaves_nothing(folder, monkeypatch):
    model = small_model()
    prompts = PromptCache(folder, "m")
    cache = read(model, TEXT)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qmix.formats.files.shard_writer.os.fsync", full)
    with pytest.raises(WriteError, match="No space left"):
        prompts.store(cache, TEXT)
    assert list(folder.iterdir()) == []


def test_a_checkpoint_that_changes_has_another_name(tmp_path):
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text(name)
    first = checkpoint_name(tmp_path)
    (tmp_path / "README.md").write_text("other")
    assert checkpoint_name(tmp_path) == first
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    second = checkpoint_name(tmp_path)
    (tmp_path / "config.json").write_text("other")
    assert len({first, second, checkpoint_name(tmp_path)}) == 3
    assert checkpoint_name(tmp_path / "model.safetensors") != second
