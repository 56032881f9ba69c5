"""What becomes of every weight in another format: its form there, and what that form does not keep.

All weights are read once for it, one at a time: whether a form is exact depends on the numbers.
Knows the formats only by `layouts.fitting`, and writes nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Literal

import torch

from qmix.commands.checkpoint import Progress
from qmix.formats import Checkpoint
from qmix.formats.layouts.fitting import Fitting, Form, dense_form
from qmix.formats.layouts.gguf_blocks import DENSE_TYPES
from qmix.formats.layouts.gguf_schemes import SCHEMES, type_of
from qmix.formats.names import ModelTensor, TensorKind
from qmix.weights.affine import Affine
from qmix.weights.dense import Weight
from qmix.weights.forms import InexactError
from qmix.weights.scheme import DENSE, Scheme
from qmix.weights.table import Table

# What is done to a weight: nothing but moving bits; its scales, its codes, or its values are
# rounded; or its blocks are copied from one GGUF file to another.
Step = Literal["exact", "scales", "codes", "dense", "copied"]

_CODED: frozenset[TensorKind] = frozenset(("attention", "expert"))  # never made dense
_FP8 = "values in FP8 with a scale"
_WIDENED = "codes of 5 or 6 bits take 8 bits there"
_DENSE = "an embedding in codes, where the format has 16 bits"
_ROUNDED = f"{_DENSE}, which do not hold it"


@dataclass(frozen=True)
class PlannedWeight:
    """One weight and what becomes of it.

    Attributes:
        source: its scheme now.
        loss: what its form does not keep; None if it keeps every bit.
        note: what changes without any loss.
    """

    tensor: ModelTensor
    source: Scheme
    form: Form
    step: Step
    loss: str | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Change:
    """One kind of loss or of change: how many weights have it, and the first of them."""

    what: str
    weights: int
    first: str

    def __str__(self) -> str:
        noun = "weight" if self.weights == 1 else "weights"
        return f"{self.what}: {self.weights} {noun}, {self.first} first"


@dataclass(frozen=True)
class ExportPlan:
    """All weights of a checkpoint; those of one group lie in the same tensors."""

    groups: tuple[tuple[PlannedWeight, ...], ...]
    act_order: bool

    @property
    def weights(self) -> Iterable[PlannedWeight]:
        return (weight for group in self.groups for weight in group)

    def losses(self) -> tuple[Change, ...]:
        """What is not kept, by kind."""
        return _changes((w.loss, w.tensor.prefix) for w in self.weights)

    def notes(self) -> tuple[Change, ...]:
        """What changes and is kept, by kind."""
        return _changes((w.note, w.tensor.prefix) for w in self.weights)

    def schemes(self) -> dict[str, Scheme]:
        """Of every linear layer by name, and of the embedding if it is packed."""
        return {
            weight.tensor.prefix: weight.form.scheme
            for weight in self.weights
            if weight.tensor.linear
            or (weight.tensor.kind == "embedding" and weight.form.scheme != DENSE)
        }

    def linear_schemes(self) -> dict[str, Scheme]:
        """Of every linear layer by name."""
        return {w.tensor.prefix: w.form.scheme for w in self.weights if w.tensor.linear}


def _changes(found: Iterable[tuple[str | None, str]]) -> tuple[Change, ...]:
    modules: dict[str, list[str]] = {}
    for what, module in found:
        if what is not None:
            modules.setdefault(what, []).append(module)
    return tuple(
        Change(what=what, weights=len(names), first=names[0]) for what, names in modules.items()
    )


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a format asks of the plan; see layouts.targets.Target."""

    fitting: Fitting
    kinds: frozenset[TensorKind]
    stacked: bool
    uniform: bool
    gguf: bool


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """One weight as it was found: the forms that hold it, exactly or with rounded scales."""

    tensor: ModelTensor
    source: Scheme
    exact: tuple[Form, ...] = ()
    rounded: tuple[Form, ...] = ()
    copied: Form | None = None
    group: int = -1
    loss: str | None = None
    note: str | None = None
    act_order: bool = False

    def planned(self, form: Form, why: str, rules: Rules) -> PlannedWeight | None:
        """The weight in a form, without rounding its codes; None if it has no such form.

        Weights that share one scheme only, and no tensor, keep their own dtypes.
        """

        def same(own: Form) -> bool:
            return own == form or (rules.uniform and own.scheme == form.scheme)

        if exact := next(filter(same, self.exact), None):
            step: Step = "copied" if exact == self.copied else "exact"
            return PlannedWeight(self.tensor, self.source, exact, step, note=self.note)
        if rounded := next(filter(same, self.rounded), None):
            return PlannedWeight(self.tensor, self.source, rounded, "scales", self.loss or why)
        return None


def plan_export(checkpoint: Checkpoint, rules: Rules, progress: Progress) -> ExportPlan:
    """Decide on every weight, after reading it.

    Args:
        progress: called with the name of the next tensor, the weights done and all weights.

    Raises:
        CheckpointError: the source is damaged.
    """
    tensors = checkpoint.tensors
    shared: dict[str, list[_Candidate]] = {}
    act_order = False
    for done, tensor in enumerate(tensors):
        progress(tensor.name, done, len(tensors))
        candidate = _candidate(checkpoint, tensor, rules)
        act_order |= candidate.act_order
        shared.setdefault(_shared_key(candidate, rules), []).append(candidate)
    planned: dict[str, PlannedWeight] = {}
    for candidates in shared.values():
        for weight in _decided(candidates, rules, checkpoint.dtype):
            planned[weight.tensor.name] = weight
    groups: dict[str, list[PlannedWeight]] = {}
    for tensor in tensors:
        groups.setdefault(_stack(tensor, rules) or tensor.name, []).append(planned[tensor.name])
    return ExportPlan(tuple(map(tuple, groups.values())), act_order)


def _stack(tensor: ModelTensor, rules: Rules) -> str | None:
    """What the experts of a layer that lie in one tensor have in common."""
    if not rules.stacked or tensor.kind != "expert":
        return None
    return f"{tensor.layer} {tensor.prefix.rpartition('.')[2]}"


def _shared_key(candidate: _Candidate, rules: Rules) -> str:
    """What weights have in common that share one form."""
    tensor = candidate.tensor
    packed = candidate.source.kind != "dense" and tensor.kind in rules.kinds
    undecided = packed and (candidate.exact or candidate.rounded or tensor.kind in _CODED)
    if rules.uniform and undecided:
        return ""
    return _stack(tensor, rules) or tensor.name


def _candidate(checkpoint: Checkpoint, tensor: ModelTensor, rules: Rules) -> _Candidate:
    packing = checkpoint.packing(tensor)
    if packing is None:
        form = _dense(checkpoint, tensor, rules)
        return _Candidate(tensor=tensor, source=DENSE, exact=(form,))
    weight = checkpoint.weight(tensor)
    source = DENSE if packing.dense else weight.scheme
    if packing.dense or tensor.kind not in rules.kinds:
        return _made_dense(checkpoint, tensor, weight, source, rules)
    exact, rounded, loss = _forms(rules.fitting, weight)
    copied, note = None, None
    if rules.gguf and packing.layout == "GGUF":
        kind = type_of(packing.infos)
        copied = Form(SCHEMES[kind], torch.float16, kind)
        exact, loss = (copied, *(form for form in exact if form != copied)), None
    held = next(iter((*exact, *rounded)), None)
    if source.bits in (5, 6) and held is not None and held.scheme.bits == 8:
        note = _WIDENED
    return _Candidate(
        tensor=tensor,
        source=source,
        exact=exact,
        rounded=rounded,
        copied=copied,
        group=source.group_size if source.integer else source.block_size,
        loss=loss,
        note=note,
        act_order=isinstance(weight, Affine) and weight.perm is not None,
    )


def _forms(
    fitting: Fitting, weight: Weight
) -> tuple[tuple[Form, ...], tuple[Form, ...], str | None]:
    """(exact forms, those with rounded scales, what is lost in them)."""
    assert isinstance(weight, (Affine, Table))
    try:
        return fitting.forms(weight), fitting.forms(weight, exact=False), None
    except InexactError as error:
        loss = str(error)
    try:
        return (), fitting.forms(weight, exact=False), loss
    except InexactError:
        return (), (), loss


def _dense(checkpoint: Checkpoint, tensor: ModelTensor, rules: Rules) -> Form:
    """The form of a dense tensor: its own; llama.cpp wants norms and routers in float32."""
    dtype = checkpoint.entry(tensor.name).dtype
    if rules.gguf and tensor.kind in ("norm", "router"):
        dtype = torch.float32
    return Form(DENSE, dtype, DENSE_TYPES[dtype] if rules.gguf else "")


def _made_dense(
    checkpoint: Checkpoint, tensor: ModelTensor, weight: Weight, source: Scheme, rules: Rules
) -> _Candidate:
    """A weight in codes or FP8 that becomes dense."""
    dtypes = (checkpoint.dtype, torch.float16, torch.bfloat16)
    try:
        form = dense_form(weight, dtypes, gguf=rules.gguf)
    except InexactError:
        loss = _FP8 if source == DENSE else _ROUNDED
        return _Candidate(tensor=tensor, source=source, loss=loss)
    return _Candidate(tensor=tensor, source=source, exact=(form,), note=_DENSE)


def _decided(
    candidates: Sequence[_Candidate], rules: Rules, dtype: torch.dtype
) -> list[PlannedWeight]:
    """What becomes of weights that share one form."""
    why = "weights of different forms that must share one"
    offered = dict.fromkeys(form for c in candidates for form in (*c.exact, *c.rounded))
    for exactly in (True, False):
        for form in offered:
            planned = [candidate.planned(form, why, rules) for candidate in candidates]
            found = [weight for weight in planned if weight is not None]
            if len(found) == len(planned) and not (exactly and any(w.loss for w in found)):
                return found
    if len(candidates) == 1 and candidates[0].tensor.kind not in _CODED | {"norm"}:
        one = candidates[0]
        form = Form(DENSE, dtype, DENSE_TYPES[dtype] if rules.gguf else "")
        return [PlannedWeight(one.tensor, one.source, form, "dense", one.loss)]
    bits = 8 if any(c.source.integer and c.source.bits > 4 for c in candidates) else 4
    group = 0
    for candidate in candidates:
        group = gcd(group, candidate.tensor.shape[1], max(candidate.group, 0))
    form = rules.fitting.rounded(bits, group, dtype)
    return [
        candidate.planned(form, why, rules)
        or PlannedWeight(candidate.tensor, candidate.source, form, "codes", candidate.loss or why)
        for candidate in candidates
    ]
