"""The rolling cache: W positions, whatever the chunks, however often they wrap."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qmix.errors import UsageError
from qmix.generation.config import GenerationConfig
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import stream
from qmix.nn.cache import KVCache
from tests.support.models import ids, small_config, small_model
from tests.support.soak import examples


@torch.no_grad()
def in_pieces(model, tokens, pieces, mask=None):
    past, parts, start = None, [], 0
    for piece in pieces:
        stop = start + piece
        seen = None if mask is None else mask[:, :stop]
        places = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)[:, start:stop]
        out = model(
            tokens[:, start:stop],
            attention_mask=seen,
            position_ids=places,
            past_key_values=past,
            use_cache=True,
        )
        past, start = out.past_key_values, stop
        parts.append(out.logits)
    return torch.cat(parts, 1), past


@given(
    window=st.integers(1, 16),
    pieces=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    padding=st.integers(0, 12),
)
def test_any_split_gives_the_same_logits_for_any_window_over_any_wrap(window, pieces, padding):
    model = small_model(sliding_window=window, num_hidden_layers=2)
    total = sum(pieces)
    tokens = ids(total, batch=2)
    mask = torch.ones_like(tokens)
    mask[1, : min(padding, total - 1)] = 0
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask, position_ids=places, use_cache=False).logits
    found, past = in_pieces(model, tokens, pieces, mask)
    keep = mask.bool()
    assert (found - whole)[keep].abs().max() < 1e-4
    assert torch.isfinite(found).all()
    assert past.stored_length == min(total, window)
    assert past.capacity <= window


@pytest.mark.parametrize(
    "pieces",
    [[60], [1] * 60, [7] * 8 + [4], [20, 1, 1, 1, 17, 20], [3, 30, 27], [8, 8, 44], [9, 16, 35]],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 8])
def test_the_named_splits_of_sixty_tokens(window, pieces):
    model = small_model(sliding_window=window)
    with torch.no_grad():
        whole = model(ids(60), use_cache=False).logits
    found, _ = in_pieces(model, ids(60), pieces)
    assert (found - whole).abs().max() < 1e-4


@examples(8)
@given(
    window=st.integers(1, 12),
    layers=st.integers(1, 3),
    changed=st.integers(0, 40),
    pieces=st.lists(st.integers(1, 20), min_size=1, max_size=4),
)
def test_a_changed_token_reaches_exactly_layers_times_window_minus_one_further(
    window, layers, changed, pieces
):
    model = small_model(sliding_window=window, num_hidden_layers=layers)
    length = 48
    pieces = [*pieces, length - sum(pieces)] if sum(pieces) < length else [length]
    one = ids(length)
    other = one.clone()
    other[0, changed] = (other[0, changed] + 7) % 100 + 3
    moved = (in_pieces(model, one, pieces)[0] - in_pieces(model, other, pieces)[0])[0]
    moved = moved.abs().amax(-1) > 1e-5
    reach = min(changed + layers * (window - 1), length - 1)
    assert moved[changed : reach + 1].all()
    assert not moved[:changed].any()
    assert not moved[reach + 1 :].any()


@torch.no_grad()
@pytest.mark.parametrize("prefill", [1, 5, 8, 30])
def test_its_bytes_stay_flat_once_the_window_is_full(prefill):
    model = small_model(sliding_window=8, num_hidden_layers=2)
    tokens = ids(prefill + 80)
    past = model(tokens[:, :prefill]).past_key_values
    sizes = []
    for at in range(prefill, tokens.shape[1]):
        model(tokens[:, at : at + 1], past_key_values=past)
        sizes.append(past.nbytes)
    full = 2 * 2 * (2 * 8 * 8) * 4  # layers, keys and values, heads x window x width, float32
    assert set(sizes[8:]) == {full}
    assert past.length == prefill + 80
    assert past.stored_length == 8


def test_a_window_allocates_no_more_than_itself():
    model = small_model(sliding_window=8)
    assert model.new_cache(2, 10_000).capacity == 8
    assert small_model().new_cache(1, 100).capacity == 100
    cache = KVCache(small_config(), 1, dtype=torch.float16, device=torch.device("cpu"))
    assert cache.nbytes == 0


@torch.no_grad()
def test_keys_are_those_of_the_true_positions_after_many_wraps():
    """Layer 0 sees embeddings only, so its keys do not depend on what the window dropped."""
    tokens = ids(50)
    full = small_model()(tokens).past_key_values
    _, rolled = in_pieces(small_model(sliding_window=8), tokens, [3, 20, 1, 1, 1, 1, 23])
    for ours, expected in zip(rolled[0], full[0], strict=True):
        assert torch.allclose(ours, expected[:, :, -8:], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("start", [3, 7, 8, 9, 20])
@pytest.mark.parametrize("cut", [1, 5, 12])
@pytest.mark.parametrize("rest", [[1, 1], [1, 9], [5], [12, 1]], ids=str)
def test_an_interrupted_pass_leaves_a_full_ring_as_it_was(start, cut, rest):
    model = small_model(sliding_window=8)
    tokens = ids(start + sum(rest))
    whole = model(tokens, use_cache=False).logits[:, start:]
    _, past = in_pieces(model, tokens[:, :start], [start - 2, 1, 1])

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[2].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(ids(40, seed=9)[:, :cut], past_key_values=past)
    hook.remove()
    assert past.length == start
    found = [
        model(piece, past_key_values=past).logits for piece in tokens[:, start:].split(rest, dim=1)
    ]
    assert (torch.cat(found, 1) - whole).abs().max() < 1e-4


@torch.no_grad()
def test_a_full_ring_goes_back_to_nothing_or_nowhere():
    model = small_model(sliding_window=8)
    _, past = in_pieces(model, ids(20), [20])
    assert [past.longest_rewindable(n) for n in (0, 5, 19, 20, 99)] == [0, 0, 0, 20, 20]
    with pytest.raises(UsageError, match="overwritten"):
        past.rewind(19)
    past.rewind(0)
    again = model(ids(12, seed=3), past_key_values=past).logits
    assert (again - model(ids(12, seed=3)).logits).abs().max() < 1e-5
    _, short = in_pieces(model, ids(7), [7])
    short.rewind(4)
    assert short.longest_rewindable(3) == 3


@torch.no_grad()
def test_a_past_longer_than_the_window_may_come_in_as_a_tuple():
    """transformers 4.38.1 keeps all keys in its tuples, window or not."""
    tokens = ids(25)
    model = small_model(sliding_window=8)
    full = small_model(sliding_window=8, use_cache=True)
    whole = model(tokens).logits[:, 20:]
    kept = [([], []) for _ in range(3)]
    for layer in full.model.layers:
        attention = layer.self_attn
        attention.k_proj.register_forward_hook(
            lambda _m, _a, out, at=attention.layer: kept[at][0].append(out)
        )
        attention.v_proj.register_forward_hook(
            lambda _m, _a, out, at=attention.layer: kept[at][1].append(out)
        )
    full(tokens[:, :20], use_cache=False)
    from qmix import kernels

    cos, sin = kernels.rotary(torch.arange(20)[None], 8, 1e6, torch.float32)
    pairs = []
    for keys, values in kept:
        keys, values = (t[0].view(1, 20, 2, 8).transpose(1, 2) for t in (keys, values))
        pairs.append((kernels.apply_rotary(keys, cos, sin), values))
    out = model(tokens[:, 20:], past_key_values=tuple(pairs))
    assert (out.logits - whole).abs().max() < 1e-4
    assert out.past_key_values.stored_length == 8


@pytest.mark.parametrize("chunk", [1, 3, 8, 13, 512])
def test_a_ragged_batch_gives_each_row_what_it_gets_alone_through_many_wraps(chunk):
    model = small_model(sliding_window=8)
    short, long = ids(3, seed=2), ids(40, seed=3)
    batch = torch.cat((torch.cat((torch.zeros(1, 37, dtype=torch.long), short), 1), long))
    mask = torch.ones_like(batch)
    mask[0, :37] = 0
    options = {"max_new_tokens": 60, "prefill_chunk_size": chunk}
    out = model.generate(batch, attention_mask=mask, **options)
    assert torch.equal(out[0, 37:], model.generate(short, **options)[0])
    assert torch.equal(out[1], model.generate(long, **options)[0])


def test_a_window_generates_in_constant_memory():
    model = small_model(sliding_window=8, num_hidden_layers=1)
    cache = model.new_cache(1)
    inputs = GenerationInputs(ids(30), GenerationConfig(max_new_tokens=90), cache=cache)
    sizes = [cache.nbytes for _ in stream(model, inputs)]
    assert len(set(sizes)) == 1
    assert cache.stored_length == 8
