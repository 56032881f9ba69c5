"""Plans: within their budgets, monotone, and what reference formulas say."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmix.config import MixtralConfig
from qmix.errors import ResourceError, UsageError
from qmix.planning import budget, machine, quantize_cost, roofline
from qmix.planning.byte_sizes import parse_size
from qmix.planning.device_footprint import on_device
from qmix.planning.estimate import estimate
from qmix.planning.footprint import on_host
from qmix.planning.plan import Plan, check_memory, plan
from qmix.planning.roofline import Rate, Rates
from qmix.planning.stored_model import StoredModel
from qmix.quantize.calibrated.bit_allocation import alike, choices_for
from qmix.weights.scheme import DENSE, NF4, Recipe, Scheme
from tests.support.process import succeeds

GIB = 1 << 30
FULL = MixtralConfig(max_position_embeddings=32768, dtype="bfloat16")
MIXTRAL = StoredModel.assume("8x7B", FULL, NF4)
SMALL = StoredModel.assume(
    "small",
    MixtralConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        dtype="bfloat16",
    ),
    NF4,
)
RATES = Rates(
    device=Rate(850e9, "test"),
    interconnect=Rate(25e9, "test"),
    host=Rate(38e9, "test"),
    disk=Rate(2e9, "test"),
)


def in_bits(bits):
    return StoredModel.assume("8x7B", FULL, choices_for(bits).typical, recipe=alike(FULL, bits))


def estimated(planned, source=None):
    return estimate(planned, RATES, in_bits, source)


def refused(*arguments, **options):
    """The plan, or the error that there is none."""
    try:
        return plan(*arguments, **options)
    except ResourceError as error:
        return error


def test_an_experts_bytes_are_the_packed_layout():
    found = on_device(MIXTRAL)
    assert set(found.experts) == {93_585_664}  # 4.25 bits and two headers of 128 bytes
    assert found.blob % 4096 == 0
    assert 0 <= found.blob - found.experts[0] < 4096
    assert found.why_no_slots is None
    four = on_device(StoredModel.assume("x", FULL, Scheme(kind="int4"))).experts[0]
    assert 8 * (four - 256) / (3 * 4096 * 14336) == 4.125


def test_what_a_token_reads_beside_experts_is_the_references():
    assert on_device(MIXTRAL).read_by_every_token == pytest.approx(0.98e9, rel=0.005)
    assert MIXTRAL.kv_bytes(1) == 131072


@pytest.mark.parametrize(
    ("slots", "copied", "slow_cpu", "fast_cpu"),
    [
        (56, 5.1, 7.9, 12.4),
        (102, 6.6, 10.1, 15.6),
        (148, 9.2, 13.9, 21.1),
        (194, 15.1, 22, 33),
        (240, 43, 57, 71),
    ],
)
def test_bounds_are_those_of_the_references_table(slots, copied, slow_cpu, fast_cpu):
    step = roofline.StepCost(
        dense=0.98e9, activations=64, expert=93.6e6, hit=slots / 256, layers=32
    )
    fast = replace(RATES, host=Rate(60e9, "test"))
    assert 1 / step.seconds("interconnect", RATES) == pytest.approx(copied, rel=0.02)
    assert 1 / step.seconds("cpu", RATES) == pytest.approx(slow_cpu, rel=0.02)
    assert 1 / step.seconds("cpu", fast) == pytest.approx(fast_cpu, rel=0.02)
    assert 1 / step.seconds("resident", RATES) == pytest.approx(122, rel=0.01)


@pytest.mark.parametrize(("gib", "slots"), [(8, 56), (12, 102), (16, 148), (20, 194), (24, 240)])
def test_slots_are_near_the_references(gib, slots):
    """It keeps 1.5 GB free for all; here the workspace and CUDA's own memory are counted."""
    found = plan(MIXTRAL, gpu=True, vram=gib * GIB, ram=32 * GIB)
    assert slots - 8 <= found.slots <= slots
    assert (found.host, found.disk) == (256, 0)


def test_a_step_of_more_rows_reads_more_experts():
    """Two, 3.5, 5.5 and 7.2 of 8 for 1, 2, 4 and 8 rows that choose independently."""
    activations = [
        plan(MIXTRAL, gpu=True, batch=b).step_cost.activations / 32 for b in (1, 2, 4, 8)
    ]
    assert activations == pytest.approx([2, 3.5, 5.469, 7.199], rel=1e-3)


SIZES = st.integers(0, 40 * GIB)


@given(
    gpu=st.booleans(),
    vram=SIZES,
    ram=SIZES,
    context=st.integers(1, 32768),
    batch=st.integers(1, 16),
)
def test_a_plan_stays_within_its_budgets(gpu, vram, ram, context, batch):
    found = refused(MIXTRAL, gpu=gpu, vram=vram, ram=ram, context=context, batch=batch)
    if isinstance(found, ResourceError):
        return
    assert found.host_memory.total <= ram
    assert not gpu or found.device_memory.total <= vram
    assert min(found.slots, found.host, found.disk) >= 0
    if found.resident:
        assert (found.slots, found.host) == ((256, 0) if gpu else (0, 256))
        assert found.disk == 0
    else:
        assert found.host + found.disk == 256
        assert found.slots * found.expert_bytes == found.device_memory["experts"]
        assert found.host * found.expert_bytes == found.host_memory["experts"]
    assert found.context <= found.largest_context
    assert found.resident == (found.resident_context >= context)
    assert (found.slots > 0) == gpu


@given(
    gpu=st.booleans(),
    vram=SIZES,
    ram=SIZES,
    more=st.integers(0, 8 * GIB),
    context=st.integers(1, 32768),
)
def test_more_memory_never_holds_less(gpu, vram, ram, more, context):
    def tiers(**changes):
        asked = {"gpu": gpu, "vram": vram, "ram": ram, "context": context, **changes}
        found = refused(MIXTRAL, **asked)
        return None if isinstance(found, ResourceError) else found

    before = tiers()
    shorter = tiers(context=max(1, context - more % 4096))
    for after in (tiers(vram=vram + more), tiers(ram=ram + more), shorter):
        if before is None:
            continue
        assert after is not None
        fastest = "slots" if gpu else "host"
        assert getattr(after, fastest) >= getattr(before, fastest)
        assert after.disk <= before.disk
        assert after.largest_context >= before.largest_context
        assert after.resident_context >= before.resident_context
        speed, slower = (
            {one.path: one.bound for one in estimated(p).speeds} for p in (after, before)
        )
        assert max(speed.values()) >= max(slower.values()) * (1 - 1e-12)


@given(
    gpu=st.booleans(),
    vram=st.integers(0, 6 * GIB),
    ram=st.integers(0, 6 * GIB),
    context=st.integers(1, 32768),
)
def test_what_a_refusal_names_fits(gpu, vram, ram, context):
    found = refused(MIXTRAL, gpu=gpu, vram=vram, ram=ram, context=context)
    if isinstance(found, Plan):
        return
    words = found.remedy.replace(",", " ").replace(";", " ").split()
    assert "\n" not in str(found)
    for _ in range(2):  # both may be short; one is named at a time
        for name, old in (("--vram", vram), ("--ram", ram)):
            if name in words:
                size = parse_size(words[words.index(name) + 1], where=name)
                assert size > old
                vram, ram = (size, ram) if name == "--vram" else (vram, size)
        found = refused(MIXTRAL, gpu=gpu, vram=vram, ram=ram, context=context)
        if isinstance(found, Plan):
            return
        words = found.remedy.replace(",", " ").replace(";", " ").split()
    raise AssertionError(found)


def test_a_named_context_fits():
    error = refused(MIXTRAL, gpu=False, ram=int(2.4 * GIB), context=8192)
    assert isinstance(error, ResourceError)
    context = int(error.remedy.partition("--ctx ")[2].rstrip("."))
    assert plan(MIXTRAL, gpu=False, ram=int(2.4 * GIB), context=context).context == context
    with pytest.raises(ResourceError):
        plan(MIXTRAL, gpu=False, ram=int(2.4 * GIB), context=context + 1)


def mixed(kinds, config=FULL):
    """Experts of these integers in turn, w1 with w3 and w2 alike."""
    rules = [
        (rf".*experts\.[{''.join(str(e) for e in range(8) if e % len(kinds) == n)}]\..*", scheme)
        for n, scheme in enumerate(Scheme(kind=kind, group_size=64) for kind in kinds)
    ]
    recipe = Recipe((*rules, (".*_proj.*", Scheme(kind="int4"))))
    return StoredModel.assume("x", config, Scheme(kind="int4"), recipe=recipe)


def test_experts_of_several_sizes_have_slots_of_the_largest():
    found = plan(mixed(["int4", "int8"]), gpu=True, vram=24 * GIB, ram=64 * GIB)
    alike = plan(mixed(["int8"]), gpu=True, vram=24 * GIB, ram=64 * GIB)
    assert found.host == 256
    assert 0 <= found.slots - alike.slots <= 3  # less is read at a time
    assert found.expert_bytes == alike.expert_bytes
    experts = found.fitting.footprint.experts
    assert experts[1] > 1.9 * experts[0]
    # All of them are in host memory, each in its own size.
    assert 0 <= found.host_memory["experts"] - sum(experts) <= 256 * 4096
    less = plan(mixed(["int4", "int8"]), gpu=True, vram=24 * GIB, ram=32 * GIB)
    assert less.host_memory.total <= 32 * GIB
    assert 8 <= less.host < 256


def test_what_codes_of_few_bits_take_more_on_a_gpu_is_counted():
    """Where inputs are no multiple of 128: those of w2, here."""
    kinds = ["int2", "int3", "int4", "int6"]
    model = mixed(kinds, FULL.replace(intermediate_size=14400))
    widened = on_device(model).widened
    assert widened.bits == ((2, 4), (3, 4), (6, 8))
    elements = 32 * 2 * 4096 * 14400  # of each kind
    assert widened.nbytes == elements * (2 + 1 + 0 + 2) // 8
    text = "codes of 2 and 3 bits take 4 on a GPU, codes of 6 bits take 8 on a GPU: "
    assert str(widened).startswith(text)
    assert plan(model, gpu=True).to_dict()["widened_bytes"] == widened.nbytes
    assert plan(model, gpu=False).to_dict()["widened_bytes"] == 0
    assert on_device(mixed(kinds)).widened is None


def test_experts_without_a_packed_layout_stay_on_the_host():
    odd = StoredModel.assume("x", MixtralConfig(hidden_act="gelu"), Scheme(kind="int8"))
    assert on_device(odd).why_no_slots
    assert plan(odd, gpu=True, vram=80 * GIB).resident
    found = plan(odd, gpu=True, vram=16 * GIB, ram=64 * GIB)
    assert not found.resident
    assert (found.slots, found.host) == (0, 256)
    assert found.device_memory.total < 16 * GIB
    fewer = plan(odd, gpu=True, vram=16 * GIB, ram=24 * GIB)
    assert 2 <= fewer.host < 256
    assert fewer.host_memory.total <= 24 * GIB
    for kind in ("int4", "int6", "int8"):
        assert not on_device(
            StoredModel.assume("x", FULL, Scheme(kind=kind, group_size=32))
        ).why_no_slots


def test_no_budget_is_no_limit():
    for gpu in (True, False):
        found = plan(MIXTRAL, gpu=gpu)
        assert found.resident
        assert found.largest_context == 32768
        assert found.context == 4096


@pytest.mark.parametrize(("name", "value"), [("context", 0), ("context", 32769), ("batch", 0)])
def test_out_of_range_is_refused(name, value):
    with pytest.raises(UsageError, match=name):
        plan(MIXTRAL, gpu=False, **{name: value})


def test_a_window_bounds_the_cache():
    rolled = StoredModel.assume("x", FULL.replace(sliding_window=4096), NF4)
    assert rolled.kv_bytes(32768) == MIXTRAL.kv_bytes(4096)
    assert plan(rolled, gpu=True, vram=12 * GIB, context=32768).slots > (
        plan(MIXTRAL, gpu=True, vram=12 * GIB, context=32768).slots
    )


def test_a_dense_checkpoint_is_planned_as_it_is():
    dense = StoredModel.assume("x", FULL, DENSE)
    assert dense.file_bytes == pytest.approx(93.4e9, rel=1e-3)
    assert plan(dense, gpu=False, ram=96 * GIB).resident
    assert not plan(dense, gpu=False, ram=32 * GIB).resident


def test_a_tied_head_is_counted_once():
    tied = on_host(StoredModel.assume("x", FULL.replace(tie_word_embeddings=True), NF4))
    assert tied.total == on_host(MIXTRAL).total - 32000 * 4096 * 2
    assert tied.read_by_every_token == on_host(MIXTRAL).read_by_every_token


def test_check_memory_names_what_is_needed_and_free(monkeypatch):
    found = plan(MIXTRAL, gpu=False)
    check_memory(found, ram_free=found.host_memory.loaded)
    with pytest.raises(
        ResourceError,
        match=r"not enough free host memory; expected 23\.\d+ GiB; found 8.00 GiB free",
    ):
        check_memory(found, ram_free=8 * GIB)
    monkeypatch.setattr(
        machine, "memory", lambda: machine.HostMemory(total=GIB, available=GIB, limit="cgroup")
    )
    with pytest.raises(ResourceError, match=r"found 1.00 GiB free"):
        check_memory(found)
    with pytest.raises(ResourceError, match=r"host memory"):
        check_memory(budget.for_rewriting(GIB))
    device = plan(MIXTRAL, gpu=True)
    check_memory(device, ram_free=GIB * 4, vram_free=26 * GIB)
    with pytest.raises(ResourceError, match=r"device memory"):
        check_memory(device, ram_free=GIB * 4, vram_free=24 * GIB)


def test_the_small_model_is_never_refused_for_memory():
    """What it takes beside the process is less than any machine that runs torch has free."""
    assert plan(SMALL, gpu=False).host_memory.loaded < 150 << 20
    assert budget.for_scoring(SMALL, 4, 512).loaded < 150 << 20
    check_memory(plan(SMALL, gpu=False), ram_free=200 << 20)


def test_the_estimate_for_a_gpu_that_is_too_small():
    found = estimated(
        plan(MIXTRAL, gpu=True, vram=16 * GIB, ram=16 * GIB), StoredModel.assume("x", FULL, DENSE)
    )
    assert {speed.path for speed in found.speeds} == {"interconnect", "cpu"}
    for speed in found.speeds:
        assert speed.expected == speed.share * speed.bound
        assert speed.bound_full < speed.bound
    changes = " ".join(one.change for one in found.suggestions)
    assert "--method gptq" in changes
    assert "A100-40" in changes
    assert "--ram" in changes
    ram = next(one for one in found.suggestions if one.change.startswith("--ram"))
    held = plan(MIXTRAL, gpu=True, vram=16 * GIB, ram=parse_size(ram.change.split()[1], where="x"))
    assert held.disk == 0
    nf4, gptq = found.quantization
    assert nf4.bytes_in == pytest.approx(93.4e9, rel=1e-3)
    assert nf4.bytes_out == pytest.approx(24.5e9, rel=0.01)
    assert gptq.gpu_seconds == pytest.approx(14.6 * 60, rel=0.02)
    assert gptq.scratch == pytest.approx(70.3e9, rel=0.01)  # 27 GB of them for the backward pass
    assert gptq.peak < 10 << 30
    assert found.to_dict()["experts"]["device"] == found.plan.slots


def test_as_many_bits_are_suggested_as_have_room():
    """24 GiB hold all experts in 3.9 bits and a context of 4096; 80 GiB hold them in NF4."""
    (auto,) = [
        one
        for one in estimated(plan(MIXTRAL, gpu=True, vram=24 * GIB)).suggestions
        if "--method auto" in one.change
    ]
    assert auto.change == "qmix quantize --method auto --bits 3.9"
    assert auto.yields.startswith("all experts in device memory, about ")
    held, over = (plan(in_bits(bits), gpu=True, vram=24 * GIB).resident for bits in (3.9, 4.0))
    assert held
    assert not over
    small = estimated(plan(MIXTRAL, gpu=True, vram=12 * GIB)).suggestions
    assert not [one for one in small if "--method auto" in one.change]


def test_a_shorter_context_is_suggested_where_it_helps():
    whole = plan(MIXTRAL, gpu=False, context=1024).host_memory.total
    found = estimated(plan(MIXTRAL, gpu=False, ram=whole, context=8192))
    (ctx,) = [one for one in found.suggestions if one.change.startswith("--ctx")]
    context = int(ctx.change.split()[1])
    assert 1024 <= context < 8192
    assert plan(MIXTRAL, gpu=False, ram=whole, context=context).resident


def test_a_cache_in_8_bits_is_suggested_where_it_makes_room():
    """24 GiB hold 8-bit keys and values of 32k beside more experts, or a longer context."""
    sixteen = plan(MIXTRAL, gpu=True, vram=24 * GIB, context=32768)
    eight = plan(MIXTRAL, gpu=True, vram=24 * GIB, context=32768, kv="int8")
    saved = 32768 * 32 * 8 * 2 * (2 * 128 - 132)
    assert sixteen.device_memory["KV cache"] - eight.device_memory["KV cache"] == saved
    assert eight.slots > sixteen.slots
    assert eight.to_dict()["kv"] == "int8"
    (kv,) = [s for s in estimated(sixteen).suggestions if s.change.startswith("--kv")]
    assert f"{eight.slots - sixteen.slots} more of 256 experts" in kv.yields
    assert not [s for s in estimated(eight).suggestions if s.change.startswith("--kv")]
    held = plan(MIXTRAL, gpu=True, vram=26 * GIB, context=4096)
    (kv,) = estimated(held).suggestions
    longer = plan(MIXTRAL, gpu=True, vram=26 * GIB, context=4096, kv="int8").resident_context
    assert kv.yields == f"contexts of {longer} instead of {held.resident_context}"


def test_nothing_is_suggested_where_all_fits():
    assert estimated(plan(MIXTRAL, gpu=True, vram=80 * GIB)).suggestions == ()


def test_the_disk_is_counted_in_the_bound():
    found = plan(MIXTRAL, gpu=False, ram=16 * GIB)
    (speed,) = estimated(found).speeds
    step = found.step_cost
    seconds = (step.dense + 64 * step.expert) / 38e9 + found.disk / 256 * 64 * step.expert / 2e9
    assert 1 / speed.bound == pytest.approx(seconds, rel=1e-9)


def test_work_is_the_logs():
    """evals/LOG.md: 144 TFLOP a layer of 8 x 512 tokens; 75 PFLOP, 9 minutes, for 256 x 2048."""
    assert quantize_cost.work(FULL, 8 * 512, by_loss=False).flops == pytest.approx(144e12, rel=0.01)
    whole = quantize_cost.work(FULL, 256 * 2048, by_loss=False)
    assert 32 * whole.flops == pytest.approx(75e15, rel=0.01)
    assert whole.gpu_seconds(32) == pytest.approx(8.6 * 60, rel=0.02)
    assert whole.gpu_seconds(32, tokens_fit=False) == pytest.approx(24.9 * 60, rel=0.02)


def test_the_loss_at_the_end_costs_a_backward_pass_and_launches_for_each_block_of_outputs():
    """A third of the 105 PFLOP more; of 15 minutes a quarter of one are launches."""
    own, both = (quantize_cost.work(FULL, 256 * 2048, by_loss=by_loss) for by_loss in (False, True))
    assert 32 * both.flops == pytest.approx(105e15, rel=0.01)
    assert both.rounding.launches == pytest.approx(8.7 * own.rounding.launches, rel=0.01)
    assert 32 * both.rounding.launch_seconds == pytest.approx(18.6, rel=0.02)
    assert both.gpu_seconds(32) == pytest.approx(14.6 * 60, rel=0.02)
    assert both.gpu_seconds(32) < 15 * 60
    assert both.peak_bytes == pytest.approx(5.5 * (1 << 30), rel=0.01)
    few = quantize_cost.work(FULL, 1024, by_loss=True)
    assert few.forward_flops < both.forward_flops / 256  # the backward pass is of 65,536 at most


def test_tokens_beside_the_next_layer_take_no_time_of_their_own_until_the_disk_is_busier():
    work = quantize_cost.work(FULL, 256 * 2048)
    assert work.saved_bytes / quantize_cost.GPU_DISK > 8
    without = replace(work, saved_bytes=0)
    assert without.gpu_seconds(32) == work.gpu_seconds(32)
    many = replace(work, saved_bytes=10 * work.saved_bytes)
    assert many.gpu_seconds(32) > 10 * work.saved_bytes / quantize_cost.GPU_DISK * 32


@pytest.mark.parametrize(("width", "share"), [(512, 1), (1024, 1), (4096, 0.625), (14336, 0.536)])
def test_a_symmetric_sum_takes_little_more_than_half(width, share):
    found = quantize_cost.symmetric_work(width) / (2 * width**2)
    assert found == pytest.approx(share, abs=0.001)


def test_planning_imports_no_torch():
    code = (
        "import sys, pathlib\n"
        "from qmix import cli\n"
        "from qmix.commands import plan_text, planner\n"
        "request = planner.PlanRequest(source=pathlib.Path('evals/tiny'), ram='1G')\n"
        "plan_text.text(planner.answer(request))\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    succeeds(code)
