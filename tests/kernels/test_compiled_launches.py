"""Whatever a step or a prompt launches is among the kernels that are compiled ahead of time.

The launches are those of the code itself, at full size on meta tensors, with what Triton would
learn about their arguments: types, constants, tensors that are absent, multiples of 16, ones.
"""

from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
import torch

from qmix import kernels
from qmix.config import MixtralConfig
from qmix.kernels import dense
from qmix.weights.dense import Dense

pytest.importorskip("triton")

from qmix.evals.timing import random_model
from qmix.evals.timing.plain_kernels import plain_kernels
from qmix.evals.timing.weight_kernels import weight_kernels
from qmix.generation.static_decoder import StaticDecoder
from qmix.kernels import Routes
from qmix.kernels.gpu import attention, fused, moe, pointwise
from qmix.kernels.gpu.step_tuning import UNTUNED, StepTuning
from qmix.quantize.rounding import gptq_kernels
from qmix.quantize.rounding.gptq_group import GroupOptions
from qmix.quantize.rounding.solver import Solver
from qmix.tuning.axes import SEPARATE
from qmix.weights.packed.packed_shapes import ExpertFormat
from qmix.weights.packed.table import ExpertTable
from qmix.weights.scheme import Scheme

NF4, INT4, INT3 = random_model.NF4, random_model.INT4, random_model.INT3
META = torch.device("meta")
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
}
# Constants that count: rounds of unrolled loops, elements of a vector. Fewer cost no more.
COUNTS = {"Z", "S", "SLICES", "LAST_S", "LAST_SLICES", "PARTS", "SPLITS", "SHARED"}
OPTIONS = {"num_warps", "launch_pdl", "maxnreg"}


@dataclass(frozen=True)
class Specialization:
    """What Triton compiles a kernel for."""

    kernel: str
    constants: frozenset
    types: frozenset
    multiples: frozenset
    options: frozenset

    @property
    def counts(self):
        return {name: value for name, value in self.constants if name in COUNTS}

    @property
    def without_counts(self):
        rest = {(name, value) for name, value in self.constants if name not in COUNTS}
        return replace(self, constants=frozenset(rest))


def of_launch(kernel, arguments, named):
    """As Triton's own specialization: integers of 1 become constants, see triton.language."""
    options = frozenset((name, value) for name, value in named.items() if name in OPTIONS)
    bound = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    constants, types, multiples = set(), set(), set()
    for parameter in kernel.params:
        name, value = parameter.name, bound[parameter.name]
        free = parameter.do_not_specialize
        is_one = isinstance(value, int) and value == 1 and not free
        if parameter.is_constexpr or value is None or is_one:
            constants.add((name, value))
            continue
        if isinstance(value, torch.Tensor):
            types.add((name, TYPES[value.dtype]))
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        else:
            types.add((name, "fp32" if isinstance(value, float) else "i32"))
            aligned = isinstance(value, int) and value % 16 == 0
        if aligned and not free and not parameter.do_not_specialize_on_alignment:
            multiples.add(name)
    sets = (constants, types, multiples)
    return Specialization(kernel.__name__, *map(frozenset, sets), options)


def of_source(source):
    """The same of a kernel that is compiled ahead of time."""
    options = {"num_warps": source.warps, **source.options}
    if source.constants.get("DEPENDENT"):
        options["launch_pdl"] = True
    multiples = {
        each.name
        for each in source.function.params
        if each.name in source.types.keys() & source.multiples
        and not (each.do_not_specialize or each.do_not_specialize_on_alignment)
    }
    return Specialization(
        source.function.__name__,
        frozenset(source.constants.items()),
        frozenset(source.types.items()),
        frozenset(multiples),
        frozenset(options.items()),
    )


@pytest.fixture(scope="module")
def compiled():
    """The counts that each kernel is compiled with, by the kernel."""
    found = defaultdict(list)
    for variant in (*weight_kernels([90], [NF4, INT4, INT3]), *plain_kernels([90])):
        one = of_source(variant.source())
        found[one.without_counts].append(one.counts)
    return found


@pytest.fixture
def launched(monkeypatch):
    """Whatever is launched, by devices of every usual number of multiprocessors."""
    found = set()

    def launch(kernel, grid, *arguments, **named):
        found.add(of_launch(kernel, arguments, named))

    for module in (attention, fused, gptq_kernels, moe, pointwise):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setitem(kernels._LINEAR, (Dense, "meta"), dense.linear)  # the head's
    monkeypatch.setattr("qmix.generation.layer_launches.can_depend", lambda device: True)
    return found


def have_multiprocessors(count, monkeypatch):
    for module in (attention, moe):
        monkeypatch.setattr(module, "multiprocessors", lambda *_, **__: count)


def missing(launched, compiled):
    """What no kernel of the list covers."""
    return sorted(
        f"{one.kernel} {dict(one.constants)}, {sorted(one.multiples)}, {dict(one.options)}"
        for one in launched
        if not any(
            all(value <= most.get(name, 0) for name, value in one.counts.items())
            for most in compiled[one.without_counts]
        )
    )


# Of an RTX 3090, an A100, a 4090, an H100, a B200 and a 5090.
MULTIPROCESSORS = (82, 108, 128, 132, 148, 170)
DEPENDENT = StepTuning(dependent=True, prefetch=True)  # where the tuner turns them on


@pytest.mark.parametrize("plan", [NF4, INT4, INT3], ids=str)
@pytest.mark.parametrize("kv", ["16", "int8"])
def test_every_launch_of_a_step_is_compiled(plan, kv, launched, compiled, monkeypatch):
    model = random_model.build_random_model(MixtralConfig(num_hidden_layers=2), plan, META)
    model.model.kv = kv

    def step(batch, tuning, padded):
        cache = model.new_cache(batch, 4096)
        StaticDecoder(model.model, model.lm_head, cache, padded=padded, tuning=tuning).step()

    for count in MULTIPROCESSORS:
        have_multiprocessors(count, monkeypatch)
        step(1, UNTUNED, padded=False)
        step(1, SEPARATE, padded=False)
    for batch, tuning in ((1, DEPENDENT), (9, DEPENDENT), (17, DEPENDENT), (2, SEPARATE)):
        for padded in (False, True):
            step(batch, tuning, padded)
    assert {one.kernel for one in launched} >= {"matmul_rotate_store", "split", "rotate_store"}
    assert missing(launched, compiled) == []


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device=META)


@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 100, 1024])
def test_every_launch_of_a_prompt_is_compiled(tokens, launched, compiled, monkeypatch):
    """And of experts in two forms, with and without padding, over numbers and over codes."""
    have_multiprocessors(132, monkeypatch)
    of = [ExpertFormat(plan, plan, (28672, 4096)) for plan in (NF4, INT4, INT3)]
    x = meta(tokens, 4096)
    routes = Routes(meta(tokens, 2, dtype=torch.int64), meta(tokens, 2, dtype=torch.float32))
    for formats in ((of[0],) * 8, (*of, *of) + (of[0],) * 2):
        moe.experts(x, routes, ExpertTable(meta(1, 8, dtype=torch.int64), formats, []), 0)
    pointwise.rms_norm(x, x[0], 1e-5)
    pointwise.route(meta(tokens, 8), 2)
    q = meta(1, tokens, 32, 128).transpose(1, 2)
    pointwise.apply_rotary(q, meta(1, 1, tokens, 128), meta(1, 1, tokens, 128))
    for rows in (meta(1, 8, 4096, 128), meta(1, 8, 4096, 132, dtype=torch.int8)):
        for mask in (None, torch.ones(1, 4096, dtype=torch.bool, device=META)):
            attention.attend(q, rows, rows, window=None, padding_mask=mask)
    assert missing(launched, compiled) == []


def test_what_is_not_compiled_is_found(launched, compiled, monkeypatch):
    have_multiprocessors(132, monkeypatch)
    pointwise.rms_norm(meta(3, 2048), meta(2048), 1e-5)
    (found,) = missing(launched, compiled)
    assert found.startswith("residual_norm")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_every_launch_of_quantizing_is_compiled(size, symmetric, launched, compiled):
    scheme = Scheme(kind="int4", group_size=size, symmetric=symmetric)
    options = GroupOptions(live_scales=True, scale_search=True, trials=8)
    steps = gptq_kernels.GroupKernels(scheme, options, META)
    weights = meta(3, 512, 1792, dtype=torch.float32)
    hessians = meta(3, 512, 512, dtype=torch.float32)
    solver = Solver(weights, hessians, scheme, size, steps)
    solver.round_greedily(hessians, lambda _: None)
    solver.refine(lambda _: None)
    assert {one.kernel for one in launched} == {"search_grid", "round_group", "refine_group"}
    assert missing(launched, compiled) == []
