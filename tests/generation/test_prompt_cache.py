"""Keys and values in a folder: what is found again, what is refused, and what is thrown away."""

import errno
import os
import stat
import time
from collections import Counter

import pytest
import torch

from qmix.errors import CheckpointError, WriteError
from qmix.formats.files import safetensors_header
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


def test_a_file_that_is_not_used_is_looked_into_once(folder, monkeypatch):
    model = small_model()
    prompts = PromptCache(folder, "m")
    texts = [ids(40, seed=seed)[0].tolist() for seed in range(11, 16)]
    for text in texts:
        prompts.store(read(model, text), text)
    read_header = safetensors_header.read_header
    looked = Counter()

    def counted(path):
        looked[path] += 1
        return read_header(path)

    monkeypatch.setattr(safetensors_header, "read_header", counted)
    fresh = PromptCache(folder, "m")
    for _ in range(3):
        assert fresh.restore(model.new_cache(1), [*TEXT, 1]) == 0
    assert set(looked.values()) == {1}
    assert len(looked) == 5
    assert fresh.restore(model.new_cache(1), [*texts[0], 1]) == 40
    prompts.store(read(model, TEXT), TEXT)  # another process' file is seen
    assert fresh.restore(model.new_cache(1), [*TEXT, 1]) == 60


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
    with pytest.raises(WriteError, match=f"{folder}: .*others can write"):
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
    left = folder / f"{'a' * 16}.writing"
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


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_folder_that_can_only_be_read_gives_what_it_has(folder, monkeypatch, number):
    model = small_model()
    prompts = PromptCache(folder, "m")
    kept = read(model, TEXT)
    prompts.store(kept, TEXT)
    (path,) = files(folder)

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    for name in ("utime", "unlink", "chmod", "replace"):
        monkeypatch.setattr(f"os.{name}", refuse)
    assert prompts.restore(model.new_cache(1), [*TEXT, 1]) == 60
    assert prompts.keep(kept, TEXT) == 60  # it is there already
    other = ids(60, seed=3)[0].tolist()
    with pytest.warns(UserWarning, match="a prompt was not kept: .*cannot be written"):
        assert prompts.keep(read(model, other), other) == 0
    path.write_bytes(path.read_bytes()[:-1])
    assert prompts.restore(model.new_cache(1), [*TEXT, 1]) == 0  # damaged, and it stays
    assert path.exists()


def test_what_others_keep_in_the_folder_stays(folder):
    model = small_model()
    PromptCache(folder, "m").store(read(model, TEXT), TEXT)
    (path,) = files(folder)
    others = ["model-00001-of-00002.safetensors", "a.writing", f"{path.name}.safetensors"]
    for name in others:
        (folder / name).write_bytes(bytes(path.stat().st_size))
        os.utime(folder / name, (0, 0))
    other = ids(60, seed=3)[0].tolist()
    limited = PromptCache(folder, "m", limit_bytes=path.stat().st_size)
    assert limited.store(read(model, other), other)
    assert not path.exists()
    assert all((folder / name).exists() for name in others)


def test_a_folder_that_was_removed_is_made_again_and_one_that_was_opened_is_refused(folder):
    model = small_model()
    prompts = PromptCache(folder, "m")
    folder.rmdir()
    assert prompts.store(read(model, TEXT), TEXT)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    with pytest.raises(WriteError, match="others can write"):
        prompts.store(read(model, TEXT[1:]), TEXT[1:])
    assert prompts.restore(model.new_cache(1), [*TEXT, 1]) == 0


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "prompts").write_text("mine")
    with pytest.raises(WriteError, match="Not a directory"):
        PromptCache(tmp_path / "prompts", "m")
    with pytest.raises(WriteError, match="Not a directory"):
        PromptCache(tmp_path / "prompts" / "deeper", "m")


def test_a_checkpoint_that_changes_has_another_name(tmp_path):
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text(name)
    first = checkpoint_name(tmp_path)
    (tmp_path / "README.md").write_text("other")
    (tmp_path / "folder.bin").mkdir()
    (tmp_path / "adapter.safetensors").symlink_to("nowhere")
    assert checkpoint_name(tmp_path) == first
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    second = checkpoint_name(tmp_path)
    (tmp_path / "config.json").write_text("other")
    third = checkpoint_name(tmp_path)
    (tmp_path / "quantize_config.json").write_text("{}")
    assert len({first, second, third, checkpoint_name(tmp_path)}) == 4


def test_a_weight_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_text("weights")

    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*Permission denied"):
        checkpoint_name(tmp_path)


@pytest.mark.parametrize("size", [1, 4095, 4097, 300_000])
def test_a_checkpoint_of_the_same_sizes_and_times_has_another_name(tmp_path, size):
    def name_of(data):
        (tmp_path / "model.safetensors").write_bytes(data)
        os.utime(tmp_path / "model.safetensors", ns=(1, 1))
        return checkpoint_name(tmp_path)

    plain = bytes(size)
    trained = [plain[:-1] + b"1", b"1" + plain[1:], b"1" * size]
    assert len({name_of(data) for data in (plain, *trained)}) == (4 if size > 1 else 2)


def test_every_shard_of_a_gguf_model_counts(tmp_path):
    shards = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for shard in shards:
        shard.write_text("one")
    first = checkpoint_name(shards[0])
    shards[1].write_text("two")
    assert checkpoint_name(shards[0]) != first
