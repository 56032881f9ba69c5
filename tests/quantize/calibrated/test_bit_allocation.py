"""Bits by measured loss: the measurement against the whole model, the budget, the file."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from qmix import kernels
from qmix.commands.checkpoint.inspect import inspect
from qmix.commands.checkpoint.verify import verify
from qmix.errors import UnsupportedError, UsageError
from qmix.formats import open_checkpoint
from qmix.formats.layouts import gptq_config
from qmix.formats.names import layer_tensors
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.quantize.calibrated.bit_allocation import (
    NARROW,
    WIDE,
    Choices,
    QuantGroup,
    allocate_bits,
    choices_for,
    loss_of,
)
from qmix.quantize.calibrated.sensitivity import Sensitivity
from qmix.quantize.methods import QuantizeRequest, quantize_checkpoint
from qmix.quantize.rounding import rtn
from qmix.weights.dense import Dense
from qmix.weights.scheme import Scheme
from tests.support.calibration import TEXT
from tests.support.models import write_dense
from tests.support.process import qmix

LAYERS, EXPERTS = 2, 4
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Widths of 128, so that every choice of groups fits."""
    return write_dense(
        tmp_path_factory.mktemp("allocation") / "source",
        hidden_size=128, intermediate_size=128, initializer_range=0.1,
        num_hidden_layers=LAYERS, num_local_experts=EXPERTS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 2048, (3, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def units(source, ids):
    return groups(source, ids, Choices(WIDE, WIDE[0]))


def groups(source, ids, choices, *, attention=True):
    checkpoint = open_checkpoint(source)
    return Sensitivity(checkpoint, ids, choices, attention=attention, device=CPU).groups()


@pytest.fixture(scope="module")
def narrow_units(source, ids):
    return groups(source, ids, choices_for(3))


def names_of(unit):
    return [tensor.name.removeprefix("model.layers.") for tensor in unit.tensors]


def test_every_matrix_is_in_one_unit_and_more_bits_lose_less(units):
    base = [
        [f"{i}.self_attn.{x}_proj.weight" for x in "qkv"] for i in range(LAYERS)
    ] + [[f"{i}.self_attn.o_proj.weight"] for i in range(LAYERS)]  # fmt: skip
    for i, e in itertools.product(range(LAYERS), range(EXPERTS)):
        expert = f"{i}.block_sparse_moe.experts.{e}"
        base += [[f"{expert}.w1.weight", f"{expert}.w3.weight"], [f"{expert}.w2.weight"]]
    assert sorted(names_of(unit) for unit in units) == sorted(base)
    for unit in units:
        assert unit.parameters == sum(math.prod(tensor.shape) for tensor in unit.tensors)
        g128, _, g32, int8 = unit.losses
        assert g128 > g32 > 20 * int8 > 0


def rounded(model, names, scheme):
    for name in names:
        linear = model.get_submodule(name.removesuffix(".weight"))
        weight = rtn.quantize(linear.weight.detach(), scheme, search=True)
        linear.store(Dense(weight.dequantize(torch.float32)))


def load(source):
    return MixtralForCausalLM.from_pretrained(source, dtype=torch.float32, device="cpu")


@torch.no_grad()
def divergence(source, ids, names, scheme):
    exact, model = load(source), load(source)
    rounded(model, names, scheme)
    before, after = (one(input_ids=ids).logits.log_softmax(-1) for one in (exact, model))
    return float((before.exp() * (before - after)).sum(-1).mean())


GROUPS = ("qkv", "o", "w1 w3", "w2")


def group_of(unit):
    """(layer, which of GROUPS)."""
    first = names_of(unit)[0]
    part = first.split(".")[-2]
    return int(first[0]), {"q_proj": "qkv", "o_proj": "o", "w1": "w1 w3", "w2": "w2"}[part]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_losses_of_a_group_are_the_whole_models_divergence(source, ids, units, layer, group):
    mine = [unit for unit in units if group_of(unit) == (layer, group)]
    names = [tensor.name for unit in mine for tensor in unit.tensors]
    expected = divergence(source, ids, names, WIDE[0])
    assert expected > 1e-5
    assert sum(unit.losses[0] for unit in mine) == pytest.approx(expected, rel=0.02)


def test_a_small_budget_is_measured_with_its_typical_scheme(source, ids, narrow_units):
    typical = choices_for(3).typical
    assert typical == Scheme(kind="int2", group_size=32)
    assert choices_for(3.5).typical == Scheme(kind="int3", group_size=32)
    mine = [unit for unit in narrow_units if group_of(unit) == (0, "w2")]
    names = [tensor.name for unit in mine for tensor in unit.tensors]
    expected = divergence(source, ids, names, typical)
    losses = [unit.losses[unit.schemes.index(typical)] for unit in mine]
    assert sum(losses) == pytest.approx(expected, rel=0.02)
    for unit in narrow_units:
        assert list(unit.losses) == sorted(unit.losses, reverse=True)


def ratios(changes):
    return [change / changes[0] for change in changes]


@torch.no_grad()
def test_within_a_group_the_change_of_the_blocks_output_divides(source, ids, units):
    """Directly: an o, and two experts' w2, under every choice."""
    model, inputs = load(source), {}
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: inputs.update(o=args[0].flatten(0, 1))
    )
    moe = model.model.layers[1].block_sparse_moe
    moe.gate.register_forward_pre_hook(lambda _, args: inputs.update(x=args[0]))
    model(input_ids=ids)

    def changes(weight, x, share=1.0):
        found = []
        for scheme in WIDE:
            other = rtn.quantize(weight, scheme, search=True).dequantize(torch.float32)
            found.append(float((functional.linear(x, other - weight) * share).square().sum()))
        return found

    by_name = {names_of(unit)[0]: unit for unit in units}
    direct = changes(model.model.layers[1].self_attn.o_proj.weight, inputs["o"])
    unit = by_name["1.self_attn.o_proj.weight"]
    assert ratios(unit.losses) == pytest.approx(ratios(direct), rel=0.01)

    x = inputs["x"]
    routes = kernels.route(moe.gate(x), 2)
    firsts = []
    for expert in (0, 3):
        token, slot = torch.where(routes.ids == expert)
        swiglu = moe.experts[expert]
        inner = functional.silu(swiglu.w1(x[token])) * swiglu.w3(x[token])
        direct = changes(swiglu.w2.weight, inner, routes.weights[token, slot, None])
        unit = by_name[f"1.block_sparse_moe.experts.{expert}.w2.weight"]
        assert ratios(unit.losses) == pytest.approx(ratios(direct), rel=0.01)
        firsts.append((unit.losses[0], direct[0]))
    assert firsts[0][0] / firsts[1][0] == pytest.approx(firsts[0][1] / firsts[1][1], rel=0.01)


def test_measuring_changes_nothing_and_is_the_same_twice(source, ids, units):
    again = groups(source, ids, Choices(WIDE, WIDE[0]))
    assert [unit.losses for unit in again] == [unit.losses for unit in units]


def test_without_the_attention_its_matrices_are_no_units(source, ids, units):
    found = groups(source, ids, Choices(WIDE, WIDE[0]), attention=False)
    experts = [unit for unit in units if group_of(unit)[1] in ("w1 w3", "w2")]
    assert [names_of(unit) for unit in found] == [names_of(unit) for unit in experts]
    for one, other in zip(found, experts, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-3)


def outcome(units, bits):
    """(bits a weight, loss) of the recipe, by its rules."""
    recipe = allocate_bits(units, bits)
    spent = 0.0
    for unit in units:
        (scheme,) = {recipe.scheme_of(tensor.name) for tensor in unit.tensors}
        spent += unit.parameters * scheme.bits_per_weight
    return spent / sum(unit.parameters for unit in units), loss_of(units, recipe)


BUDGETS = (4.125, 4.13, 4.2, 4.25, 4.4, 4.5, 5, 6, 7.5, 8.125)
SMALL_BUDGETS = (2.5, 2.75, 2.9, 3, 3.25, 3.5, 4)


def within(budgets, found):
    for budget, (bits, _) in zip(budgets, found, strict=True):
        assert bits <= budget + 1e-9
        assert bits > budget - 0.13  # less than one step of the largest unit is left


def test_a_small_budget_holds_and_more_of_it_loses_less(narrow_units):
    found = [outcome(narrow_units, bits) for bits in SMALL_BUDGETS]
    within(SMALL_BUDGETS, found)
    losses = [loss for _, loss in found]
    assert losses == sorted(losses, reverse=True)
    # At the bits of a uniform choice it loses less than that.
    for bits, level in ((2.5, 1), (3.125, 2), (3.5, 3)):
        uniform = sum(unit.losses[level] for unit in narrow_units)
        assert outcome(narrow_units, bits)[1] < uniform


def test_the_budget_holds_and_more_of_it_loses_less(units):
    found = [outcome(units, bits) for bits in BUDGETS]
    within(BUDGETS, found)
    losses = [loss for _, loss in found]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(sum(unit.losses[0] for unit in units))
    assert losses[-1] == pytest.approx(sum(unit.losses[-1] for unit in units))
    # At the bits of a uniform choice it loses less than that.
    for bits, level in ((4.25, 1), (4.5, 2)):
        assert outcome(units, bits)[1] < sum(unit.losses[level] for unit in units)


def test_close_to_the_best_of_all_recipes(units):
    few = [unit for unit in units if group_of(unit)[0] == 1][:6]
    total = sum(unit.parameters for unit in few)
    every = [
        (
            sum(unit.parameters * WIDE[level].bits_per_weight
                for unit, level in zip(few, levels, strict=True)) / total,
            sum(unit.losses[level] for unit, level in zip(few, levels, strict=True)),
        )
        for levels in itertools.product(range(len(WIDE)), repeat=len(few))
    ]  # fmt: skip
    start = sum(unit.losses[0] for unit in few)
    for budget in (4.25, 4.4, 5, 6):
        best = min(loss for bits, loss in every if bits <= budget + 1e-9)
        assert start - outcome(few, budget)[1] >= 0.75 * (start - best)


def test_what_costs_nothing_gets_no_bits(source):
    tensors = layer_tensors(open_checkpoint(source).config, 0)
    linear = [tensor for tensor in tensors if tensor.name.endswith("w2.weight")][:2]
    free, dear = (QuantGroup((tensor,), losses, WIDE) for tensor, losses in zip(
        linear, [(0.0, 0.0, 0.0, 0.0), (4.0, 3.0, 2.0, 0.1)], strict=True))  # fmt: skip
    recipe = allocate_bits([free, dear], 8.125)
    assert recipe.scheme_of(linear[0].name) == WIDE[0]
    assert recipe.scheme_of(linear[1].name) == WIDE[-1]


@pytest.mark.parametrize("bits", [0.0, 2, 2.499, 8.126, -1, 16, math.inf, math.nan])
def test_a_budget_that_no_recipe_meets_is_refused(source, tmp_path, bits):
    with pytest.raises(UsageError, match=r"--bits: out of range; expected 2\.5 to 8\.125"):
        QuantizeRequest(method="auto", bits=bits)


def test_a_width_that_a_scheme_does_not_fit_is_refused_before_anything_is_measured(tmp_path):
    source = write_dense(
        tmp_path / "source", hidden_size=64, intermediate_size=64, num_hidden_layers=1
    )
    request = QuantizeRequest(method="auto", bits=2.9, samples=2, seqlen=32, device="cpu")
    with pytest.raises(UnsupportedError, match="cannot be written as GPTQ"):
        quantize_checkpoint(source, tmp_path / "out", request, TEXT)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("budget", [4.7, 2.9])
def test_what_is_written_has_rules_that_every_reader_agrees_with(source, tmp_path, budget):
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "out"
    command = [
        "quantize", source, out, "--method", "auto", "--bits", str(budget), "--samples", "4",
        "--seqlen", "32", "--device", "cpu", "--calibration", tmp_path / "text.txt", "--json",
    ]  # fmt: skip
    result = qmix(*command)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["method"] == "auto"
    assert verify(out).problems == ()
    found = open_checkpoint(out)
    settings = found.config.quantization_config
    assert settings["dynamic"]
    assert json.loads((out / gptq_config.FILE).read_text()) == settings
    said = gptq_config.parse(settings, "config.json")
    schemes, bits, weights = set(), 0.0, 0
    for tensor in found.tensors:
        if tensor.kind not in ("attention", "expert"):
            continue
        scheme = found.weight(tensor).scheme
        assert said.scheme_of(tensor.prefix) in (
            scheme,
            # one group of 128 inputs is all of them: the tensors cannot tell the two apart
            *(
                each
                for each in (*NARROW, *WIDE)
                if scheme.group_size == -1 and (each.bits, each.group_size) == (scheme.bits, 128)
            ),
        ), tensor.name
        schemes.add(scheme)
        bits += math.prod(tensor.shape) * scheme.bits_per_weight
        weights += math.prod(tensor.shape)
    assert len(schemes) > 1
    assert bits / weights <= budget
    shown = qmix("inspect", out)
    assert shown.returncode == 0, shown.stderr
    kinds = {group.scheme for group in inspect(out).groups if group.layout == "GPTQ"}
    assert kinds == {str(scheme) for scheme in schemes}
    assert all(kind in shown.stdout for kind in kinds)
    model = MixtralForCausalLM.from_pretrained(out, device="cpu")
    assert model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=2).shape == (1, 5)


WRONG = [
    ({"method": "gptq", "bits": 4.25}, "--bits does not apply to --method gptq"),
    ({"method": "rtn", "bits": 4.25}, "--bits does not apply to --method rtn"),
    ({"method": "nf4", "bits": 4.25}, "--bits does not apply to --method nf4"),
    ({"method": "auto", "group_size": 32}, "--group-size does not apply to --method auto"),
    ({"method": "nf4", "group_size": 32}, "--group-size does not apply to --method nf4"),
    ({"method": "auto", "asymmetric": True}, "--asymmetric does not apply to --method auto"),
    ({"method": "nf4", "asymmetric": True}, "--asymmetric does not apply to --method nf4"),
    ({"method": "gptq", "double_quant": False}, "--no-double-quant does not apply to --method gptq"),
    ({"method": "rtn", "double_quant": False}, "--no-double-quant does not apply to --method rtn"),
    ({"method": "rtn", "seqlen": 64}, "--seqlen does not apply to --method rtn"),
    ({"method": "nf4", "seqlen": 64}, "--seqlen does not apply to --method nf4"),
    ({"method": "rtn", "samples": 4}, "--samples does not apply to --method rtn"),
    ({"method": "nf4", "samples": 256}, "--samples does not apply to --method nf4"),
    ({"method": "rtn", "calibration": Path("text")}, "--calibration does not apply to --method rtn"),
    ({"method": "nf4", "calibration": Path("text")}, "--calibration does not apply to --method nf4"),
    ({"method": "rtn", "resume": True}, "--resume does not apply to --method rtn"),
    ({"method": "nf4", "resume": True}, "--resume does not apply to --method nf4"),
    ({"method": "nf4", "device": "cpu"}, "--device does not apply to --method nf4"),
    ({"method": "gptq", "group_size": 0}, "--group-size: no such group size; expected -1 or one of 32, 64, 128; found 0"),
    ({"method": "rtn", "group_size": 48}, "--group-size: no such group size"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "named"), WRONG, ids=[str(changes) for changes, _ in WRONG])
def test_options_that_a_method_does_not_have_are_refused(changes, named):
    with pytest.raises(UsageError) as caught:
        QuantizeRequest(**changes)
    assert str(caught.value).startswith(named)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--method", "gptq", "--bits", "5"], "--bits does not apply to --method gptq"),
        (["--samples", "256"], "--samples does not apply to --method nf4"),
        (["--calibration", "none"], "--calibration does not apply to --method nf4"),
        (["--method", "rtn", "--samples", "4"], "--samples does not apply to --method rtn"),
        (["--method", "hqq"], "'hqq' is not one of"),
    ],
)
def test_the_command_refuses_them_before_it_reads_anything(tmp_path, options, named):
    result = qmix("quantize", tmp_path / "none", tmp_path / "out", *options)
    assert result.returncode == 2
    assert named in result.stderr
    assert result.stdout == ""
