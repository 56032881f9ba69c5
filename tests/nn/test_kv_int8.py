"""A cache in 8 bits: all passes, rings, rows and drafts attend to the same codes."""

import dataclasses

import pytest
import torch

import qmix
from qmix.errors import UnsupportedError, UsageError
from qmix.evals.timing.bench import fill_cache
from qmix.formats import open_checkpoint
from qmix.formats.metadata import read_metadata
from qmix.generation.config import GenerationConfig
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import stream
from qmix.generation.prompt_cache import PromptCache
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.offload import Tiers
from qmix.models.options import LoadOptions
from qmix.nn.cache import KVCache
from qmix.nn.cache_ahead import CacheAhead
from qmix.nn.cache_rows import CacheRows
from qmix.nn.cache_slab import CacheSlab
from qmix.planning.plan import plan
from qmix.planning.stored_model import StoredModel
from tests.support.models import TINY, ids, small_config, small_model

NEW = 24


def eight_bits(**changes):
    model = small_model(**changes)
    model.model.kv = "int8"
    return model


@pytest.fixture(scope="module")
def nf4(tiny_nf4):
    return qmix.load(tiny_nf4, kv="int8", device="cpu")


@torch.no_grad()
def in_pieces(model, tokens, mask, pieces):
    past, parts, start = None, [], 0
    for piece in pieces:
        stop = start + piece
        places = (mask.cumsum(-1) - 1).clamp_min(0)[:, start:stop]
        out = model(
            tokens[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=places,
            past_key_values=past,
            use_cache=True,
        )
        past, start = out.past_key_values, stop
        parts.append(out.logits)
    return torch.cat(parts, 1), past


@pytest.mark.parametrize("window", [None, 7])
def test_any_split_of_a_ragged_batch_gives_the_same_logits(window):
    model = eight_bits(sliding_window=window, num_hidden_layers=2)
    tokens = ids(40, batch=2)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    whole, _ = in_pieces(model, tokens, mask, [40])
    for pieces in ([1] * 40, [9, 16, 15], [3, 30, 1, 1, 5]):
        found, past = in_pieces(model, tokens, mask, pieces)
        # A rounding of float32 may decide for the next code: a step is 1/127 of the largest.
        assert (found - whole)[mask.bool()].abs().max() < 0.02
        assert (found - whole)[mask.bool()].abs().mean() < 1e-4
        assert past.kv == "int8"
        assert past.capacity <= (window or 256)


def test_it_is_near_the_cache_in_16_bits_and_half_its_size():
    tokens = ids(50)
    model = small_model()
    with torch.no_grad():
        plain = model(tokens, use_cache=True)
        model.model.kv = "int8"
        coded = model(tokens, use_cache=True)
    # The largest is that of a router which chose otherwise.
    assert 0 < (plain.logits - coded.logits).abs().median() < 0.02
    for ours, theirs in zip(coded.past_key_values, plain.past_key_values, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            assert (one - other).abs().max() < other.abs().max() / 40
    bf16 = KVCache(model.config, 1, dtype=torch.bfloat16, device=torch.device("cpu"), capacity=64)
    int8 = KVCache(
        model.config, 1, dtype=torch.bfloat16, device=torch.device("cpu"), capacity=64, kv="int8"
    )
    assert int8.nbytes / bf16.nbytes == (8 + 4) / 16
    assert "int8 of bfloat16" in str(int8)


@pytest.mark.parametrize("window", [None, 20])
def test_texts_that_go_back_go_on_as_new_ones(window):
    model, prompt = eight_bits(sliding_window=window), ids(15)
    whole = model.generate(prompt, max_new_tokens=NEW)
    cache = model.new_cache(1)
    with torch.no_grad():
        model.next_logits(whole[:, :18], cache)
    cache.rewind(9)
    inputs = GenerationInputs(prompt, GenerationConfig(max_new_tokens=NEW), cache=cache)
    assert [int(t.ids) for t in stream(model, inputs)] == whole[0, 15:].tolist()
    taken = model.new_cache(1)
    taken.take(cache, cache.length)
    assert all(
        torch.equal(a, b)
        for x, y in zip(taken, cache, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_a_tuple_of_numbers_is_brought_into_codes():
    model, tokens = eight_bits(), ids(20)
    with torch.no_grad():
        past = model(tokens[:, :12], use_cache=True).past_key_values
        one = model(tokens[:, 12:], past_key_values=tuple(past)).logits
        other = model(tokens[:, 12:], past_key_values=past).logits
    assert torch.allclose(one, other, atol=1e-3)


def test_caches_of_another_kind_are_refused():
    model, other = small_model(), eight_bits()
    for mine, cache in ((model, other.new_cache(1)), (other, model.new_cache(1))):
        with pytest.raises(UsageError, match="does not fit this model"):
            mine.generate(ids(4), past_key_values=cache, max_new_tokens=2)


def test_gradients_are_refused_and_not_lost():
    model = eight_bits()
    with pytest.raises(UnsupportedError, match="no gradients"):
        model(ids(4))
    assert model(ids(4), use_cache=False).logits.requires_grad


def test_stored_prompts_are_of_one_kind(tmp_path):
    text = ids(60)[0].tolist()
    prompts, model = PromptCache(tmp_path / "prompts", "m"), eight_bits(sliding_window=48)
    kept = model.new_cache(1)
    with torch.no_grad():
        model.next_logits(torch.tensor([text]), kept)
    assert prompts.store(kept, text)
    assert prompts.restore(small_model(sliding_window=48).new_cache(1), [*text, 1]) == 0
    cache = model.new_cache(1)
    assert prompts.restore(cache, [*text, 1]) == 60
    for layer in range(len(cache)):
        assert all(map(torch.equal, cache.view(layer), kept.view(layer)))


@pytest.mark.parametrize("window", [None, 20])
def test_drafts_that_are_dropped_leave_a_full_ring(window):
    model, tokens = eight_bits(sliding_window=window), ids(40)
    cache = model.new_cache(1)
    with torch.no_grad():
        model.next_logits(tokens[:, :30], cache)
        before = [part.clone() for part in cache.view(1)]
        ahead = CacheAhead(cache, 5)
        model.next_logits(tokens[:, 30:35].T, ahead.rows, None, ahead.rows.position_ids())
        ahead.drop()
    assert all(map(torch.equal, cache.view(1), before))


def test_rows_of_a_slab_are_rows_of_codes():
    model = eight_bits(sliding_window=16)
    slab = CacheSlab(model.config, 3, 64, dtype=model.dtype, device=model.device, kv="int8")
    tokens = ids(20, batch=3)
    alone = [model.new_cache(1) for _ in range(3)]
    with torch.no_grad():
        for row, (one, other) in enumerate(zip(slab.rows, alone, strict=True)):
            model.next_logits(tokens[row : row + 1, : 10 + row], one)
            model.next_logits(tokens[row : row + 1, : 10 + row], other)
        slab.front([slab.rows[2], slab.rows[1]])
        new = torch.tensor([[5], [6]])
        found = [CacheRows([caches[2], caches[1]]) for caches in (slab.rows, alone)]
        one, other = (model.next_logits(new, rows, None, rows.position_ids()) for rows in found)
    assert torch.equal(one, other)


def test_the_compiled_step_of_all_layers_is_what_layers_compute(nf4, monkeypatch):
    """Rows in company, drafts, and layer by layer: the same bits."""
    import qmix.nn.decoder
    from qmix.nn.cpu_decode import WhyNot

    model, tokenizer = nf4
    prompt = torch.tensor([tokenizer.encode("def area(width, height):\n    return width * " * 2)])
    found = []
    for drafts, at_once in ((None, True), (8, True), (None, False)):
        if not at_once:
            monkeypatch.setattr(qmix.nn.decoder, "decode_tokens", lambda *_: WhyNot.OVERRIDE)
        config = GenerationConfig(max_new_tokens=NEW, prompt_lookup_num_tokens=drafts)
        out = model.generate(prompt, config, output_logits=True, return_dict_in_generate=True)
        found.append(out)
    for other in found[1:]:
        assert torch.equal(found[0].sequences, other.sequences)
        if model.exact_rows() > 1:
            assert all(map(torch.equal, found[0].logits, other.logits))


def test_experts_in_their_file_give_the_same_text(tiny_nf4, nf4):
    model, tokenizer = nf4
    tiers, options = Tiers(device=0, host=5), LoadOptions(device="cpu", kv="int8")
    offloaded = MixtralForCausalLM.from_checkpoint(open_checkpoint(tiny_nf4), options, tiers=tiers)
    prompt = torch.tensor([tokenizer.encode("The kitchen table")])
    assert torch.equal(
        offloaded.generate(prompt, max_new_tokens=12), model.generate(prompt, max_new_tokens=12)
    )


def test_loading_says_which_and_the_plan_counts_it(nf4):
    model, _ = nf4
    cache = model.new_cache(1, 64)
    assert cache.kv == "int8"
    stored = StoredModel.of(read_metadata(TINY))
    eight, sixteen = (plan(stored, gpu=False, context=64, kv=kv) for kv in ("int8", "16"))
    assert eight.host_memory["KV cache"] == cache.nbytes
    assert sixteen.host_memory["KV cache"] == 64 * 3 * 2 * 2 * 32 * 2
    with pytest.raises(UsageError, match="kv"):
        qmix.load(TINY, kv="int4")
    narrow = dataclasses.replace(stored, config=small_config(head_dim=6))
    with pytest.raises(UsageError, match="multiple of 4"):
        plan(narrow, gpu=False, kv="int8")


def test_a_cache_for_timing_is_filled_with_numbers():
    cache = eight_bits().new_cache(1, 64)
    fill_cache(cache, 50)
    keys, values = cache[1]
    assert cache.length == 50
    for found in (keys, values):
        assert 0.8 < found.std() < 1.2
