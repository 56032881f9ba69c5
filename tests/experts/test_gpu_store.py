"""Slots over host memory, which stands in for the device's: addresses, order of events, bytes.

Products read through the table's addresses, as the kernels do, and through nothing else: a stale
address gives wrong logits, not an error.
"""

import ctypes
import random
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qmix import kernels
from qmix.experts.arena import HostArena, SlotArena
from qmix.experts.gpu_experts import DeviceExperts
from qmix.experts.gpu_store import DeviceStore
from qmix.experts.policy import HEAT, PRESETS, Policy
from qmix.experts.residency import Residency, SlotState
from qmix.kernels.cpu import packed_moe as host
from qmix.kernels.gpu import packed_matmul
from qmix.models.pack import Packer
from qmix.nn.linear import Linear
from qmix.weights.packed.layout import unpack_expert, with_blob
from tests.support.interpreter import run_apart
from tests.support.interruption import interrupted_after
from tests.support.late_copies import Late
from tests.support.models import small_model
from tests.support.packed import act_order, int4, int8, nf4
from tests.support.soak import both, examples

LAYERS, EXPERTS = 3, 4
PROMPT = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 2, 3, 4, 5, 6, 7, 8, 21, 22, 23, 24]])


def at(address, template):
    """The expert whose bytes begin at an address."""
    assert address > 0
    raw = (ctypes.c_uint8 * len(template.blob)).from_address(address)
    return unpack_expert(with_blob(template, torch.frombuffer(raw, dtype=torch.uint8).clone()))


@pytest.fixture(autouse=True)
def through_the_table(monkeypatch):
    def pairs(x, routes, weights):
        """Each choice's product times its weight, float32 [T, K, D]."""
        out = torch.zeros(*routes.ids.shape, x.shape[1])
        addresses = weights.table.addresses[0].tolist()
        for index in torch.unique(routes.ids[routes.weights != 0]).tolist():
            expert = at(addresses[index], weights.packed[index])
            token, choice = torch.where((routes.ids == index) & (routes.weights != 0))
            hidden = torch.nn.functional.silu(kernels.linear(x[token], expert.w1))
            hidden = hidden * kernels.linear(x[token], expert.w3)
            y = kernels.linear(hidden, expert.w2).float()
            out[token, choice] = y * routes.weights[token, choice, None]
        return out

    monkeypatch.setattr(packed_matmul, "expert_pairs", pairs)
    monkeypatch.setattr(packed_matmul, "experts", lambda x, r, w: pairs(x, r, w).sum(1).to(x.dtype))


# An expert's weight by its number: three forms of three sizes in one layer, as `auto` makes them.
MIXED = (nf4, int8, int4, int8)


def whole_model(make):
    """A small model in the packed layout; only its experts, so that torch multiplies the rest.

    Of several makes an expert has its own; in the second layer all have the first.
    """
    model = small_model(
        hidden_size=128, intermediate_size=64, num_local_experts=EXPERTS, head_dim=16
    )
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, Linear) and ".experts." in name:
            of = make
            if isinstance(make, tuple):
                layer, expert = re.findall(r"\d+", name)[:2]
                of = make[0 if layer == "1" else int(expert)]
            module.store(of(module.out_features, module.in_features, seed))
    packer = Packer()
    for layer in model.model.layers:
        packer._pack_experts(layer.block_sparse_moe)
    assert packer.complete
    return model


def blobs_of(block):
    return [expert.blob for expert in block.stored.packed.packed]


def store_of(model, slots, *, copier, settings=HEAT, in_place=True, held=None, fill=None):
    """Offload the model's experts; returns the store."""
    blocks = [layer.block_sparse_moe for layer in model.model.layers]
    sizes = [len(blob) for block in blocks for blob in blobs_of(block)]
    host = HostArena(sizes)
    sources = []
    for index, block in enumerate(blocks):
        sources += [host.blob(index * EXPERTS + e).copy_(b) for e, b in enumerate(blobs_of(block))]
    policy = Policy(len(sources), settings)
    addresses = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
    store = DeviceStore(
        sources,
        SlotArena(slots, max(sizes), torch.device("cpu")),
        Residency(len(sources), slots, policy),
        addresses,
        copier,
        in_place=in_place,
        sizes=sizes,
        fill=fill,
    )
    for index, block in enumerate(blocks):
        here = sources[index * EXPERTS : (index + 1) * EXPERTS]
        whole = block.stored.packed.moved_to(here, addresses[index : index + 1])
        block.store(DeviceExperts(store, index, whole, list(whole)))
    store.warm(policy.order(EXPERTS))
    return store


def greedy(model, prompt=PROMPT, count=10):
    with torch.no_grad():
        out = model.generate(
            prompt, max_new_tokens=count, output_logits=True, return_dict_in_generate=True
        )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.diagonal
@pytest.mark.parametrize(
    "make", [nf4, int4, act_order, MIXED], ids=["nf4", "int4", "act-order", "mixed"]
)
@pytest.mark.parametrize("slots", [0, 2, 5, 12])
def test_logits_are_equal_bits_whatever_has_a_slot(make, slots):
    reference = greedy(whole_model(make))
    for seed, (name, policy) in enumerate(PRESETS.items()):
        model = whole_model(make)
        store = store_of(model, slots, copier=Late(seed), settings=policy)
        for _ in range(2):
            found = greedy(model)
            assert torch.equal(found[0], reference[0]), name
            assert torch.equal(found[1], reference[1]), name
        assert store.statistics().tokens >= 16


def test_a_slot_takes_experts_of_other_forms_and_sizes(monkeypatch):
    """The same bits as where all stay in memory, and every byte that moved is counted."""
    prompt = PROMPT[:, :5]
    reference, model = greedy(whole_model(MIXED), prompt), whole_model(MIXED)
    store = store_of(model, 3, copier=Late(1), settings=PRESETS["lru"])
    taken, plain = {}, store._sources.copy

    def copy(expert, slot):
        taken.setdefault(slot.data_ptr(), []).append(store.nbytes([expert]))
        return plain(expert, slot)

    monkeypatch.setattr(store._sources, "copy", copy)
    found = greedy(model, prompt)
    assert torch.equal(found[1], reference[1])
    assert any(len(set(sizes)) > 1 for sizes in taken.values())
    assert store.statistics().interconnect_bytes == sum(map(sum, taken.values()))


@examples(12)
@given(
    slots=st.integers(0, LAYERS * EXPERTS),
    name=st.sampled_from(sorted(PRESETS)),
    seed=st.integers(0, 999),
    most=st.integers(0, 6),
    rows=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 21), min_size=1, max_size=3),
)
def test_neither_delay_nor_slots_nor_policy_change_a_bit(slots, name, seed, most, rows, lengths):
    """Prompts and steps in turn, copies late, slots borrowed and taken back."""
    plain, model = whole_model(nf4), whole_model(nf4)
    store_of(model, slots, copier=Late(seed, most), settings=PRESETS[name])
    generator = torch.Generator().manual_seed(seed)
    for length in lengths:
        prompt = torch.randint(1, 100, (rows, length), generator=generator)
        assert torch.equal(greedy(model, prompt, 4)[1], greedy(plain, prompt, 4)[1])


def decode(model, count):
    cache = model.new_cache(1)
    with torch.no_grad():
        for token in range(count):
            model.next_logits(torch.tensor([[token + 1]]), cache)


def test_bytes_to_the_device_are_admissions_times_a_blob():
    model, copier = whole_model(nf4), Late(0, most=0)
    store = store_of(model, 5, copier=copier)
    size = store.slots.nbytes
    assert copier.bytes == 5 * size  # warm
    decode(model, 30)
    did, counts = store.statistics(), store.residency.counts
    assert counts.admissions > 0
    assert did.interconnect_bytes == counts.admissions * size
    assert copier.bytes == (counts.warmed + counts.admissions) * size
    assert did.in_place_bytes == did.misses * size
    assert did.hits + did.misses == did.tokens * LAYERS * 2
    assert did.tokens >= 28  # the last are read when the next step begins
    assert (did.prefill_interconnect_bytes, did.disk_bytes) == (0, 0)
    assert "zero-copy" in str(did)
    assert "5 on the device, 12 in RAM" in str(did)


@pytest.mark.parametrize("slots", [4, 7, 8, 11])
def test_a_prompt_sends_each_missing_expert_once_and_leaves_heat_alone(slots):
    model, copier = whole_model(nf4), Late(0, most=0)
    store = store_of(model, slots, copier=copier)
    size = store.slots.nbytes
    decode(model, 12)
    store.on_token_end()
    store.on_token_end()
    heat = list(store.residency.policy.heat)
    before, sent = store.statistics(), copier.bytes
    with torch.no_grad():
        model(PROMPT)
    did = store.statistics().since(before)
    kept = slots - len(store._prefill.borrowed)
    assert len(store._prefill.borrowed) == min(2, slots // EXPERTS) * EXPERTS
    assert copier.bytes - sent == did.prefill_interconnect_bytes == (LAYERS * EXPERTS - kept) * size
    assert (did.interconnect_bytes, did.tokens, did.hits, did.misses) == (0, 0, 0, 0)
    assert store.residency.policy.heat == heat
    with torch.no_grad():
        model(PROMPT)  # another chunk: the same again, nothing is taken back between
    assert copier.bytes - sent == 2 * (LAYERS * EXPERTS - kept) * size
    borrowed = len(store._prefill.borrowed)
    decode(model, 1)
    assert not store._prefill.borrowed
    assert (
        store.statistics().since(before).prefill_interconnect_bytes
        == (2 * (LAYERS * EXPERTS - kept) + borrowed) * size
    )


def test_a_victim_is_switched_back_before_its_slot_is_written():
    """The copier looks at the table when a copy begins: nothing may point to the target."""
    model = whole_model(nf4)

    class Watching(Late):
        table = None

        def copy(self, source, target):
            if self.table is not None:
                assert target.data_ptr() not in self.table.flatten().tolist()
            return super().copy(source, target)

    copier = Watching(3)
    store = store_of(model, 6, copier=copier, settings=PRESETS["lru"])
    copier.table = store.addresses
    greedy(model)
    decode(model, 20)
    greedy(model)
    assert store.residency.counts.admissions > 3
    pointed = set(store.addresses.flatten().tolist())
    assert len(pointed) == LAYERS * EXPERTS  # no two experts share a place


def test_a_copy_that_fails_is_counted_and_its_expert_stays_on_the_host():
    plain, model = whole_model(nf4), whole_model(nf4)

    class Broken(Late):
        def copy(self, source, target):
            ticket = super().copy(source, target)
            if self.random.random() < 0.5:
                ticket.done = lambda: (_ for _ in ()).throw(RuntimeError("CUDA error"))
            return ticket

    store = store_of(model, 6, copier=Broken(1))
    prompt = PROMPT[:, :5]
    for _ in range(2):
        assert torch.equal(greedy(model, prompt)[1], greedy(plain, prompt)[1])
    assert store.statistics().failures > 0
    assert "copies failed" in str(store.statistics())


@pytest.mark.parametrize("slots", [4, 5, 8, 12])
@pytest.mark.parametrize("left", [0, 5])
def test_where_the_host_cannot_be_read_every_chosen_expert_is_fetched(slots, left):
    """Not pinned, and some of them in the file only."""
    plain, model, other = whole_model(nf4), whole_model(nf4), whole_model(nf4)
    blobs = [b.clone() for layer in other.model.layers for b in blobs_of(layer.block_sparse_moe)]
    filled = []

    def fill(expert, target):
        filled.append(expert)
        target.copy_(blobs[expert])

    settings = replace(HEAT, uploads=0)
    store = store_of(model, slots, copier=Late(2), settings=settings, in_place=False, fill=fill)
    store._finish(join=True)
    for expert in range(left):
        store._sources.blobs[expert].random_(0, 256)
        store._sources.blobs[expert] = None
    for prompt in (PROMPT[:, :1], PROMPT, PROMPT[:, :4]):
        found, expected = greedy(model, prompt), greedy(plain, prompt)
        assert torch.equal(found[1], expected[1])
    did, counts = store.statistics(), store.residency.counts
    assert not store.recordable
    assert did.path == "copy"
    assert did.interconnect_bytes == counts.fetches * store.slots.nbytes
    assert did.in_place_bytes == 0
    assert did.disk == left
    assert bool(filled) == bool(left)


@pytest.mark.parametrize("alike", [True, False])
def test_misses_on_the_cpu_give_the_sum_in_routing_order(monkeypatch, alike):
    """Activations down, products up. Where both sides compute alike, equal bits; else near ones."""
    if alike:

        def same(x, routes, weights):
            whole = SimpleNamespace(table=None, packed=weights)
            blobs = torch.tensor([[expert.blob.data_ptr() for expert in weights]])
            whole.table = SimpleNamespace(addresses=blobs)
            return packed_matmul.expert_pairs(x, routes, whole).sum(1)

        monkeypatch.setattr(host, "experts", same)
    plain, model = whole_model(nf4), whole_model(nf4)
    copier = Late(5)
    store = store_of(model, 5, copier=copier)
    expected = greedy(plain, PROMPT[:, :3])
    store.path.observe("zero-copy", 10**9, 1.0)
    store.path.observe("cpu", 10**12, 1.0)
    assert store.path.choose() == "cpu"
    assert not store.recordable
    store.path.weight = 0  # what this machine reaches is no matter
    found = greedy(model, PROMPT[:, :3])
    assert torch.equal(found[0], expected[0])
    if alike:
        assert torch.equal(found[1], expected[1])
    assert (found[1] - expected[1]).norm() < 2e-3 * expected[1].norm()
    did = store.statistics()
    assert did.path == "cpu"
    assert did.path_switches == 1
    assert did.in_place_bytes == 0
    assert did.misses > 0
    assert "misses by cpu" in str(did)


def test_the_decode_step_keeps_a_log_of_its_routes(monkeypatch):
    """The host reads the step's log once a token; a step of another length changes nothing."""
    model = whole_model(nf4)
    store = store_of(model, 5, copier=Late(0, most=0))
    logs = []
    plain = store.log
    monkeypatch.setattr(store, "log", lambda routes: logs.append(routes.clone()) or plain(routes))
    decode(model, 3)
    assert [tuple(log.shape) for log in logs] == [(LAYERS, 1, 2)] * 3


@pytest.mark.slow
@both
def test_the_kernels_through_the_table_in_the_interpreter(soak):
    pytest.importorskip("triton")
    run_apart("store", interpreted=True, soak=soak)


@pytest.mark.gpu
def test_the_kernels_through_the_table_on_the_gpu():
    run_apart("store", interpreted=False)


@pytest.fixture(params=[2, 9])
def shared(request):
    """A model over a store of so many slots, its store, two prompts and their logits."""
    plain, model = whole_model(nf4), whole_model(nf4)
    store = store_of(model, request.param, copier=Late(request.param))
    prompts = (PROMPT, PROMPT[:, :3])
    return model, store, prompts, [greedy(plain, prompt, 4)[1] for prompt in prompts]


def test_threads_that_share_a_store_get_the_text_of_one(shared):
    model, _, prompts, expected = shared

    def work(first):
        for index in (first % 2, 1 - first % 2, first % 2):
            assert torch.equal(greedy(model, prompts[index], 4)[1], expected[index])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))


@both
def test_an_interruption_at_any_line_leaves_the_store_right(shared, soak):
    """As Ctrl-C does, an exception may come between any two lines of the store's own code."""
    model, store, prompts, expected = shared
    lines = random.Random(len(store.slots))
    for attempt in range(200 if soak else 12):
        file = ("residency.py", "gpu_store.py", "prefill_stream.py")[attempt % 3]
        with suppress(KeyboardInterrupt), interrupted_after(lines.randrange(1, 150), file):
            greedy(model, prompts[attempt % 2], 4)
        for prompt, wanted in zip(prompts, expected, strict=True):
            assert torch.equal(greedy(model, prompt, 4)[1], wanted), attempt
        states = store.residency.states
        assert states.count(SlotState.BORROWED) == len(store._prefill.borrowed)
        assert states.count(SlotState.FILLING) == len(store._copies)
