"""One token through the compiled code, a layer in two calls or all in one, against the modules."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import pytest
import torch

import qmix.nn.decoder
import qmix.nn.decoder_layer
from qmix import MixtralForCausalLM, kernels
from qmix.config import MixtralConfig
from qmix.kernels import attention
from qmix.kernels.cpu.library import attends, library
from qmix.nn.attention import ForwardContext
from qmix.nn.cache import KVCache
from qmix.nn.cache_ahead import CacheAhead
from qmix.nn.cache_rows import CacheRows
from qmix.nn.cpu_decode import WhyNot, decode_tokens, run_layer, why_not_step
from qmix.nn.decoder_layer import DecoderLayer, compiled_whole
from qmix.nn.linear import Linear
from qmix.weights.dense import Dense
from tests.support.cpu_kernels import (
    random_affine,
    random_int4,
    random_nf4,
    random_table,
    seeded,
)

CONFIG = MixtralConfig(
    hidden_size=256,
    intermediate_size=384,
    num_attention_heads=8,
    num_key_value_heads=2,
    num_hidden_layers=1,
    num_local_experts=4,
)
WEIGHTS = {
    "nf4": random_nf4,
    "nested": partial(random_nf4, nested=True),
    "int4": lambda n, k: random_int4(n, k, k // 32),
    "act-order": lambda n, k: random_int4(n, k, k // 64, zeros=True, perm=True),
    "e2m1": random_table,
    "iq4": partial(random_table, kind="iq4", block=32, scales="6 bits of 8"),
    "biases": partial(random_affine, scales="6 bits of 8", biases="6 bits of 8"),
    "int8": partial(random_affine, bits=8, group=16, scales="8 bits of 16"),
    "int3": partial(random_affine, bits=3, group=64, biases=torch.bfloat16),
}


def random_layer(kind, config=CONFIG):
    layer = DecoderLayer(config, 0).bfloat16().eval()
    for name, module in layer.named_modules():
        if isinstance(module, Linear) and not name.endswith("gate"):
            module.store(WEIGHTS[kind](module.out_features, module.in_features))
        elif isinstance(module, Linear):
            torch.nn.init.normal_(module.weight, generator=seeded(5))
        elif name.endswith("norm"):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5, generator=seeded(6))
    return layer


def run(layer, tokens=5, config=CONFIG):
    """Outputs and router logits of a short prompt and of single tokens after it."""
    cache = KVCache(config, 1, dtype=torch.bfloat16, device=torch.device("cpu"))
    outs = []
    for index, new in enumerate([3] + [1] * tokens):
        positions = cache.length + torch.arange(new)[None]
        cos, sin = kernels.rotary(positions, config.head_dim, config.rope_theta, torch.bfloat16)
        x = torch.randn(1, new, config.hidden_size, generator=seeded(index)).bfloat16()
        with torch.no_grad():
            outs += layer(x, ForwardContext(cos=cos, sin=sin, cache=cache))
        cache.advance(new)
    return outs


def by_modules(layer, **options):
    """The same without the compiled calls."""
    layer.compiled = lambda: WhyNot.OVERRIDE
    try:
        return run(layer, **options)
    finally:
        del layer.compiled


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def alike(ours, theirs):
    """The same, but for a few in a thousand that round to bfloat16 the other way."""
    pairs = list(zip(ours, theirs, strict=True))
    turned = torch.cat([(a != b).flatten() for a, b in pairs]).float().mean()
    return turned <= 0.01 and all(torch.allclose(a, b, rtol=2**-6, atol=0.02) for a, b in pairs)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("window", [None, 4])
def test_it_is_what_the_modules_compute(isa, kind, window):
    config = MixtralConfig(**{**CONFIG.to_dict(), "sliding_window": window})
    layer = random_layer(kind, config)
    ours = run(layer, config=config)
    assert taken(layer, config) == (isa != "torch")
    if isa != "torch":
        assert layer.compiled().has_experts
    else:
        assert layer.compiled() is WhyNot.NO_KERNELS
    assert alike(ours, by_modules(layer, config=config))
    with kernels.override("reference"):
        oracle = run(layer, config=config)
    for out, reference in zip(ours, oracle, strict=True):
        assert (out - reference).abs().max() <= 0.05 * reference.abs().max()


pytestmark = pytest.mark.usefixtures("compiled")


def taken(layer, config=CONFIG):
    """Whether a token goes through the compiled calls."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            qmix.nn.decoder_layer, "run_layer", lambda *given: calls.append(1) or run_layer(*given)
        )
        run(layer, 1, config)
    return calls == [1]


def test_new_weights_are_seen():
    layer = random_layer("nf4")
    before = run(layer)
    changes = (
        lambda: layer.self_attn.o_proj.store(random_int4(256, 256, 4)),
        lambda: layer.block_sparse_moe.experts[1].w2.store(random_int4(256, 384, 4)),
        lambda: layer.input_layernorm.weight.data.mul_(1.5),
        lambda: setattr(layer.input_layernorm.weight, "data", torch.ones(256).bfloat16()),
        lambda: layer.block_sparse_moe.gate.store(Dense(torch.randn(4, 256).bfloat16())),
    )
    for change in changes:
        change()
        after = run(layer)
        assert not alike(before, after)
        assert alike(after, by_modules(layer))
        before = after
    assert taken(layer)


def test_experts_of_another_kind_are_multiplied_by_their_own_kernels():
    layer = random_layer("nf4")
    layer.block_sparse_moe.experts[2].w1.store(Dense(torch.randn(384, 256).bfloat16() / 16))
    assert taken(layer)
    assert not layer.compiled().has_experts
    with torch.no_grad():
        assert decode_tokens([layer.compiled()], *one_pass()) is WhyNot.EXPERTS
    assert alike(run(layer), by_modules(layer))


@pytest.mark.parametrize(
    "name",
    [
        "self_attn",
        "block_sparse_moe",
        "self_attn.q_proj",
        "block_sparse_moe.gate",
        "input_layernorm",
    ],
)
def test_hooks_are_called(name):
    layer, calls = random_layer("nf4"), []
    before = run(layer)
    handle = layer.get_submodule(name).register_forward_hook(lambda *given: calls.append(given))
    assert alike(run(layer), before)
    assert len(calls) == 6
    handle.remove()
    assert taken(layer)


def test_an_adapter_in_place_of_a_linear_is_called():
    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    layer = random_layer("nf4")
    before = run(layer)
    layer.self_attn.v_proj = Adapter(layer.self_attn.v_proj)
    assert not alike(run(layer), before)


def one_pass(position=0, **options):
    """Hidden states of one token, and what its layers need to know."""
    return torch.randn(1, 1, 256, generator=seeded()).bfloat16(), context_at(position, **options)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("gradients", WhyNot.GRADIENTS),
        ("float32", WhyNot.DTYPE),
        ("too many rows", WhyNot.SEVERAL_TOKENS),
        ("training", WhyNot.TRAINING),
        ("attentions", WhyNot.ATTENTIONS),
        ("reference", WhyNot.OVERRIDE),
        ("strides", WhyNot.STRIDES),
    ],
)
def test_what_it_cannot_do_goes_through_the_modules(where, reason, monkeypatch):
    monkeypatch.setattr("qmix.nn.decoder_layer.run_layer", None)
    layer = random_layer("nf4")
    dtype = torch.float32 if where == "float32" else torch.bfloat16
    layer = layer.to(dtype).train(where == "training")
    cos, sin = kernels.rotary(torch.tensor([[7]]), 32, 1e6, dtype)
    attentions = [] if where == "attentions" else None
    context = ForwardContext(cos=cos, sin=sin, attentions=attentions)
    x = torch.randn(17 if where == "too many rows" else 1, 1, 256, generator=seeded()).to(dtype)
    if where == "strides":
        x = torch.stack((x, x), -1)[..., 0]
    override = kernels.override("reference") if where == "reference" else nullcontext()
    with torch.set_grad_enabled(where == "gradients"), override:
        out, _ = layer(x, context)
        assert (why_not_step(x, context) or layer.compiled()) is reason
    assert out.requires_grad == (where == "gradients")
    assert attentions is None or len(attentions) == 1


def test_copies_have_their_own():
    layer = random_layer("act-order")
    before = run(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same(run(other), before)
        assert other.compiled().pointers.q.codes != layer.compiled().pointers.q.codes


def test_inputs_that_are_no_numbers_come_out_as_none():
    layer = random_layer("int4")
    cos, sin = kernels.rotary(torch.tensor([[7]]), 32, 1e6, torch.bfloat16)
    x = torch.ones(1, 1, 256).bfloat16()
    x[0, 0, 3] = torch.inf
    with torch.no_grad():
        out, logits = layer(x, ForwardContext(cos=cos, sin=sin))
    assert taken(layer)
    assert out.isnan().all()
    assert logits.isnan().all()


@pytest.mark.parametrize(("experts", "chosen"), [(8, 2), (4, 1), (16, 3), (128, 2), (8, 8)])
def test_the_router_chooses_as_torch_among_equals_too(experts, chosen):
    config = MixtralConfig(
        **{**CONFIG.to_dict(), "num_local_experts": experts, "num_experts_per_tok": chosen}
    )
    layer = random_layer("nf4", config)
    for index in range(20):
        # Logits that tie as bfloat16, that tie as vanishing shares, and others.
        scale = (1e-3, 3.0, 0.05)[index % 3]
        gate = scale * torch.randn(experts, 256, generator=seeded(index))
        gate[index % experts] = gate[0]
        layer.block_sparse_moe.gate.store(Dense(gate.bfloat16()))
        x = torch.randn(1, 1, 256, generator=seeded(index)).bfloat16()
        with torch.no_grad():
            token = layer.compiled()
            _, normed, logits, routes = library().after_attention(token, x, x)
        assert torch.equal(logits, layer.block_sparse_moe.gate(normed))
        expected = kernels.route(logits, chosen)
        assert torch.equal(routes.ids, expected.ids)
        assert torch.allclose(routes.weights, expected.weights, rtol=1e-6, atol=1e-12)


def random_model(kind="nf4", window=None, layers=3):
    config = MixtralConfig(
        **{
            **CONFIG.to_dict(),
            "num_hidden_layers": layers,
            "sliding_window": window,
            "vocab_size": 64,
        }
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).bfloat16().eval()
    for index in range(layers):
        model.model.layers[index] = random_layer(kind, config)
        model.model.layers[index].self_attn.layer = index
    return model


def said(model, *, at_once=True, tokens=12, cache=None, **options):
    """Logits of 3 tokens and of single ones after them, and which of these went in one call."""
    ids = torch.randint(0, 64, (1, 3 + tokens), generator=seeded(1))
    cache = model.new_cache(1) if cache is None else cache
    logits, went = [], []

    def spied(*given):
        found = decode_tokens(*given) if at_once else WhyNot.OVERRIDE
        went.append(not isinstance(found, WhyNot))
        return found

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(qmix.nn.decoder, "decode_tokens", spied)
        for piece in (ids[:, :3], *ids[:, 3:].split(1, 1)):
            out = model(piece, past_key_values=cache, output_router_logits=True, **options)
            logits += [out.logits, *out.router_logits]
    return logits, went[1:]


@pytest.mark.parametrize("window", [None, 3, 5, 8])
def test_all_layers_at_once_are_what_they_are_one_by_one(isa, window):
    model = random_model(window=window)
    together, went = said(model)
    assert went == [isa != "torch"] * 12
    apart, went = said(model, at_once=False)
    assert not any(went)
    assert same(together, apart)


@pytest.mark.parametrize("kind", ["nested", "act-order", "int8"])
@pytest.mark.parametrize("caches", ["of one row each", "of all rows"])
def test_a_row_is_what_it_is_alone_in_any_company(compiled, kind, caches):
    """In caches of their own, of different lengths, and in one cache."""
    if library().isa == "portable":
        pytest.skip("its tiles sum otherwise than its rows")
    model, ids = random_model(kind), torch.randint(0, 64, (5, 9), generator=seeded(2))
    starts = range(5) if caches == "of one row each" else [0] * 5

    def steps(cache, row, first):
        """Logits of the ids from `first` on, each in a step."""
        return [model.next_logits(new[None, None], cache) for new in ids[row, first:]]

    with torch.no_grad():
        alone = [steps(model.new_cache(1), row, 0)[start:] for row, start in enumerate(starts)]
        if caches == "of all rows":
            cache = model.new_cache(5)
            found = [model.next_logits(ids[:, index, None], cache) for index in range(9)]
        else:
            rows = [model.new_cache(1) for _ in starts]
            for row, (cache, start) in enumerate(zip(rows, starts, strict=True)):
                for new in ids[row, :start]:
                    model.next_logits(new[None, None], cache)
            together, found = CacheRows(rows), []
            for index in range(5):
                new = torch.stack([ids[row, start + index] for row, start in enumerate(starts)])
                positions = together.position_ids()
                found.append(model.next_logits(new[:, None], together, None, positions))
    for index, logits in enumerate(found):
        assert torch.equal(logits, torch.cat([one[index] for one in alone]))


@pytest.mark.parametrize("kind", ["nested", "act-order", "biases", "mixed"])
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "layer by layer"])
def test_positions_of_one_text_are_what_they_are_one_after_another(isa, kind, at_once, monkeypatch):
    """As many as exact_rows says: to the bit, in a full ring too."""
    model = random_model("nf4" if kind == "mixed" else kind, window=20, layers=2)
    if kind == "mixed":
        model.model.layers[1].block_sparse_moe.experts[3].w2.store(WEIGHTS["int8"](256, 384))
    rows = model.exact_rows()
    assert rows == most_rows(isa, kind)
    if rows == 1:
        return
    if not at_once:
        monkeypatch.setattr(qmix.nn.decoder, "decode_tokens", lambda *_: WhyNot.OVERRIDE)
    ids = torch.randint(0, 64, (30 + rows,), generator=seeded(3))
    for length in (2, 30):
        alone, together = model.new_cache(1), model.new_cache(1)
        model.next_logits(ids[None, :length], alone)
        model.next_logits(ids[None, :length], together)
        new = ids[length : length + rows, None]
        expected = torch.cat([model.next_logits(one[None], alone) for one in new])
        ahead = CacheAhead(together, rows)
        found = model.next_logits(new, ahead.rows, None, ahead.rows.position_ids())
        assert torch.equal(found, expected)
        for _ in range(rows):
            ahead.keep()
        for ours, theirs in zip(together, alone, strict=True):
            assert all(map(torch.equal, ours, theirs))


def most_rows(isa, kind):
    """What exact_rows should say of a model in a kind of weights."""
    if isa in ("torch", "portable"):
        return 1
    return {"vnni": (16, 8), "avx512": (12, 8)}.get(isa, (12, 5))[kind == "mixed"]


@pytest.mark.parametrize(
    "change", ["hook", "dense expert", "eager", "backend", "override", "float32", "head's hook"]
)
def test_rows_may_round_otherwise_where_other_code_computes_them(compiled, change):
    model = random_model(layers=2)
    if change == "hook":
        model.model.layers[1].register_forward_hook(lambda *_: None)
    elif change == "dense expert":
        expert = model.model.layers[1].block_sparse_moe.experts[0]
        expert.w2.store(Dense(torch.randn(256, 384).bfloat16()))
    elif change == "eager":
        model.model.attn_implementation = "eager"
    elif change == "backend":
        model.model.backend = "torch"
    elif change == "float32":
        model.float()
    elif change == "head's hook":
        model.lm_head.register_forward_hook(lambda *_: None)
    with kernels.override("reference") if change == "override" else nullcontext():
        assert model.exact_rows() == 1


def test_a_cache_that_grows_rewinds_and_was_interrupted_stays_right():
    model = random_model()
    cache = model.new_cache(1)
    first, _ = said(model, cache=cache, tokens=300)  # beyond the first capacity
    assert cache.length == 303
    keys, values = cache[1]
    other = model.new_cache(1)
    again, _ = said(model, at_once=False, cache=other, tokens=300)
    assert same(first, again)
    assert torch.equal(keys, other[1][0])
    assert torch.equal(values, other[1][1])
    cache.rewind(100)
    other.rewind(100)
    with torch.no_grad():
        decode_tokens(  # a pass that never counts
            map(compiled_whole, model.model.layers),
            torch.randn(1, 1, 256).bfloat16(),
            context_at(100, cache=cache),
        )
    assert cache.length == 100
    assert same(said(model, cache=cache)[0], said(model, at_once=False, cache=other)[0])


def context_at(position, **options):
    cos, sin = kernels.rotary(torch.tensor([[position]]), 32, CONFIG.rope_theta, torch.bfloat16)
    return ForwardContext(**{"cos": cos, "sin": sin, **options})


def test_a_token_without_a_past_sees_itself():
    model, x = random_model(), torch.randn(1, 1, 256, generator=seeded()).bfloat16()
    with torch.no_grad():
        out, logits = decode_tokens(map(compiled_whole, model.model.layers), x, context_at(0))
        before = x.clone()
        for index, layer in enumerate(model.model.layers):
            x, expected = layer(x, context_at(0))
            assert torch.equal(logits[index], expected)
    assert torch.equal(out, x)
    assert not torch.equal(out, before)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("hook", WhyNot.OBSERVED),
        ("forward", WhyNot.OBSERVED),
        ("dense expert", WhyNot.EXPERTS),
        ("dense projection", WhyNot.PROJECTIONS),
        ("strided router", WhyNot.DENSE_PARTS),
        ("training", WhyNot.TRAINING),
        ("eager", WhyNot.IMPLEMENTATION),
        ("other layer", WhyNot.OTHER_CLASS),
        ("a mask", WhyNot.MASK),
        ("float32 cache", WhyNot.CACHE),
    ],
)
def test_layers_that_must_be_called_one_by_one_are(change, reason):
    model = random_model()
    layers, options, calls = model.model.layers, {}, []
    if change == "hook":
        layers[1].register_forward_hook(lambda *given: calls.append(given))
    elif change == "forward":
        own = layers[1].forward
        layers[1].forward = lambda *given: calls.append(given) or own(*given)
    elif change == "dense expert":
        layers[2].block_sparse_moe.experts[0].w2.store(Dense(torch.randn(256, 384).bfloat16()))
    elif change == "dense projection":
        layers[2].self_attn.o_proj.store(Dense(torch.randn(256, 256).bfloat16()))
    elif change == "strided router":
        layers[1].block_sparse_moe.gate.store(Dense(torch.randn(256, 4).bfloat16().T))
    elif change == "training":
        layers[0].train()
    elif change == "eager":
        model.set_attn_implementation("eager")
    elif change == "other layer":

        class Other(DecoderLayer):
            def forward(self, x, context):
                calls.append(x)
                return super().forward(x, context)

        layers[1].__class__ = Other
    elif change == "a mask":
        options["padding_mask"] = torch.tensor([[True]])
    else:
        options["cache"] = KVCache(model.config, 1, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        context = context_at(0, attn_implementation=model.model.attn_implementation, **options)
        x = torch.randn(1, 1, 256).bfloat16()
        assert decode_tokens(map(compiled_whole, layers), x, context) is reason
    if not options:
        found, went = said(model)
        assert not any(went)
        assert same(found, said(model, at_once=False)[0])
        assert len(calls) == (26 if change in ("hook", "forward", "other layer") else 0)


def test_hidden_states_are_those_of_every_layer():
    model = random_model()
    logits, went = said(model, output_hidden_states=True)
    assert not went  # never asked
    assert same(logits, said(model)[0])


def test_a_call_keeps_no_state():
    """Two threads that share a model get the results that one gets."""
    model = random_model()
    ids = torch.randint(0, 64, (1, 15), generator=seeded(1))

    def talked(_):
        cache, logits = model.new_cache(1), []
        with torch.no_grad():
            for piece in (ids[:, :3], *ids[:, 3:].split(1, 1)):
                out = model(piece, past_key_values=cache, output_router_logits=True)
                logits += [out.logits, *out.router_logits]
        return logits

    expected = talked(None)
    with ThreadPoolExecutor(2) as pool:
        assert all(same(found, expected) for found in pool.map(talked, range(4)))


@pytest.mark.parametrize(
    ("batch", "heads", "groups", "keys", "width"),
    [
        (1, 8, 2, 1, 32),
        (1, 32, 8, 127, 128),
        (1, 32, 8, 129, 128),
        (2, 4, 4, 40, 64),
        (3, 6, 2, 300, 20),
        (1, 5, 1, 1030, 80),
        (1, 14, 2, 256, 16),
    ],
)
def test_attention_of_one_token(isa, batch, heads, groups, keys, width):
    def drawn(seed, *shape):
        return torch.randn(*shape, generator=seeded(seed)).bfloat16()

    q = drawn(0, batch, heads, 1, width)
    k, v = (drawn(seed, batch, groups, keys + 7, width)[:, :, 3 : 3 + keys] for seed in (1, 2))
    assert attends(q, k, v) == (isa != "torch")
    with torch.no_grad():
        out = kernels.attend(q, k, v)
    everything = torch.ones(1, 1, 1, keys, dtype=torch.bool)
    exact = attention.reference(q.float(), k, v, everything)
    assert out.shape == q.shape
    assert (out - exact).abs().max() <= 2**-8 * exact.abs().max() + (0.01 if isa == "torch" else 0)
    if isa == "torch":
        return
    near = max(1, keys - 5)
    windowed = kernels.attend(q, k, v, kernels.AttentionMask(near))
    exact = attention.reference(
        q.float(), k[:, :, -near:], v[:, :, -near:], everything[..., -near:]
    )
    assert (windowed - exact).abs().max() <= 2**-8 * exact.abs().max()
    q = 100 * q  # all of a head's weight on one key, nearly
    sharp = kernels.attend(q, k, v)
    exact = attention.reference(q.float(), k, v, everything)
    assert (sharp - exact).abs().max() <= 2**-8 * exact.abs().max()
    k[0, 0, keys // 2] = torch.nan
    found = kernels.attend(q, k, v)
    assert found[0, : heads // groups].isnan().all()
    assert found[0, heads // groups :].isfinite().all()


def test_the_number_of_threads_changes_no_bit_of_attention():
    q = torch.randn(1, 32, 1, 128, generator=seeded()).bfloat16()
    k = torch.randn(1, 8, 3000, 128, generator=seeded(1)).bfloat16()
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 16):
            torch.set_num_threads(threads)
            outs.append(kernels.attend(q, k, k))
    finally:
        torch.set_num_threads(before)
    assert same(outs, [outs[0]] * 5)


def test_attention_with_gradients_is_torchs():
    q = torch.randn(1, 4, 1, 32).bfloat16().requires_grad_()
    k = torch.randn(1, 2, 9, 32).bfloat16()
    assert kernels.attend(q, k, k).requires_grad
