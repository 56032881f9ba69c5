"""Which of a LoRA's tensors belong to which weight, from the names and shapes that PEFT writes.

Modules may bear the classic names, those of transformers 5, or be experts that are stacked in one
parameter. Shape letters: N outputs, K inputs, r the rank, E experts, F expert width, D hidden
width. Knows no values.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from qmix.errors import CheckpointError
from qmix.formats import Checkpoint, names
from qmix.formats.names import ModelTensor

_PARTS = {"lora_A": "a", "lora_B": "b", "lora_embedding_A": "a", "lora_embedding_B": "b"}
_LORA = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.weight)?"
)
_STACKED = re.compile(
    r"model\.layers\.(\d{1,6})\.(?:mlp|block_sparse_moe)\.experts((?:\.base_layer)*)"
)

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What a LoRA holds for one weight: names of its tensors, and how they make the update.

    Attributes:
        a, b: the factors [r, K] and [N, r]; None: only `whole` is given.
        magnitude: the lengths of the rows after the merge (DoRA, arXiv 2402.09353).
        whole: replaces the weight.
        rank: r.
        keys: names of the module, by one of which a setting may choose it.
        transposed: the product is that of the transposed weight, as for an embedding.
        expert, experts: which of how many stacked experts; None: it is not stacked.
        rows: of the stacked parameter, which are the weight's.
    """

    a: str | None = None
    b: str | None = None
    magnitude: str | None = None
    whole: str | None = None
    rank: int = 0
    keys: tuple[str, ...] = ()
    transposed: bool = False
    expert: int | None = None
    experts: int = 1
    rows: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, parts: Mapping[str, str]) -> "Factors":
        """From the names by part: a, b, magnitude, whole."""
        a, b, magnitude, whole = map(parts.get, ("a", "b", "magnitude", "whole"))
        return cls(a=a, b=b, magnitude=magnitude, whole=whole)

    def slices(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of this weight, from those of all experts."""
        if self.expert is None:
            return a, b
        a = a.reshape(self.experts, -1, a.shape[1])[self.expert]
        b = b.reshape(b.shape[0], -1, self.experts)[:, :, self.expert]
        start, stop = self.rows
        return (a[:, start:stop], b) if self.transposed else (a, b[start:stop])


def updates(
    shapes: Mapping[str, Shape], checkpoint: Checkpoint, path: Path, *, transposed: bool = False
) -> dict[str, Factors]:
    """What a LoRA holds for each weight, by the weight's canonical name.

    Args:
        shapes: of its tensors, by name.
        path: the file, for errors.
        transposed: how stacked experts are read where their shapes fit both ways.

    Raises:
        CheckpointError: a tensor of no weight of the checkpoint, one without its other factor, or
            one of another shape.
    """
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    found: dict[str, dict[str, str]] = {}  # module -> part -> name
    unknown: list[str] = []
    for name in shapes:
        module = re.sub(r"^(base_model\.model\.)?", "", name, count=1)
        if match := _LORA.fullmatch(module):
            found.setdefault(match[1], {})[_PARTS.get(match[2], "magnitude")] = name
        elif module.endswith(".weight"):
            module = re.sub(r"(\.base_layer|\.modules_to_save(\.default)?)?\.weight$", "", module)
            found.setdefault(module, {})["whole"] = name
        else:
            unknown.append(name)
    result: dict[str, Factors] = {}
    for module, parts in found.items():
        if match := _STACKED.fullmatch(_with_model(module)):
            made = dict(_stacked(match, parts, shapes, checkpoint, path, transposed))
        else:
            made = dict(_plain(module, parts, shapes, tensors, path))
        if not made or result.keys() & made.keys():
            unknown.extend(parts.values())
        result.update(made)
    if unknown or not result:
        raise CheckpointError(
            "the adapter is of another model" if unknown else "the adapter holds nothing",
            where=str(path),
            expected="factors of this model's weights",
            found=", ".join(sorted(unknown)[:5]) or "no tensors",
        )
    return result


def _with_model(module: str) -> str:
    return f"model.{module}" if module.startswith("layers.") else module


def _plain(
    module: str,
    parts: Mapping[str, str],
    shapes: Mapping[str, Shape],
    tensors: Mapping[str, ModelTensor],
    path: Path,
) -> Iterator[tuple[str, Factors]]:
    """The update of one matrix, embedding or norm."""
    tensor = tensors.get(names.canonical(f"{module}.weight"))
    if tensor is None:
        return
    is_embedding = tensor.kind == "embedding"
    factors = replace(Factors.of(parts), keys=(module,), transposed=is_embedding)
    _check_pair(factors, path)
    expected: dict[str, Shape] = {}
    if factors.whole:
        expected[factors.whole] = tensor.shape
    if factors.a and factors.b:
        outputs, inputs = tensor.shape[::-1] if factors.transposed else tensor.shape
        rank = shapes[factors.a][0]
        expected |= {factors.a: (rank, inputs), factors.b: (outputs, rank)}
        factors = replace(factors, rank=rank)
    if factors.magnitude:
        expected[factors.magnitude] = (tensor.shape[0],)
    for name, shape in expected.items():
        if tuple(size for size in shapes[name] if size != 1) != tuple(s for s in shape if s != 1):
            raise _wrong_shape(name, shape, shapes[name], path)
    yield tensor.name, factors


def _stacked(
    match: re.Match[str],
    parts: Mapping[str, str],
    shapes: Mapping[str, Shape],
    checkpoint: Checkpoint,
    path: Path,
    transposed: bool,
) -> Iterator[tuple[str, Factors]]:
    """The updates of one layer's experts, all in one: gate and up, or down, by their shapes.

    PEFT before 0.19 takes the parameter's first axis of a matrix for its inputs.

    Args:
        transposed: whether it did, where the shapes do not say.
    """
    factors = Factors.of(parts)
    _check_pair(factors, path)
    config = checkpoint.config
    hidden, inner, experts = (
        config.hidden_size, config.intermediate_size, config.num_local_experts,
    )  # fmt: skip
    layer = int(match[1])
    if layer >= config.num_hidden_layers or not factors.a or not factors.b:
        return
    (total, inputs), (outputs, other) = shapes[factors.a][:2], shapes[factors.b][:2]
    straight = {(hidden, 2 * inner): "gate_up_proj", (inner, hidden): "down_proj"}
    crossed = {shape[::-1]: name for shape, name in straight.items()}
    read_first, read_last = (crossed, straight) if transposed else (straight, crossed)
    shape = inputs, outputs
    if total != other or total % experts or shape not in {**straight, **crossed}:
        raise _wrong_shape(
            factors.a, (f"r * {experts}", f"{hidden} or {inner}"), shapes[factors.a], path
        )
    kinds = read_first if shape in read_first else read_last
    parameter = kinds[shape]
    module = match[0].replace(".base_layer", "")
    shared = replace(
        factors,
        rank=total // experts,
        keys=(f"{module}.{parameter}", module),
        transposed=kinds is crossed,
        experts=experts,
    )
    rows = {"w1": (0, inner), "w3": (inner, 2 * inner)}
    if parameter == "down_proj":
        rows = {"w2": (0, hidden)}
    for expert in range(experts):
        for part, span in rows.items():
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"
            yield name, replace(shared, expert=expert, rows=span)


def _check_pair(factors: Factors, path: Path) -> None:
    if (factors.a is None) != (factors.b is None):
        raise CheckpointError(
            "a factor without the other",
            where=str(path),
            expected="lora_A and lora_B",
            found=factors.a or factors.b,
        )


def _wrong_shape(name: str, expected: object, found: Shape, path: Path) -> CheckpointError:
    vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight"))
    return CheckpointError(
        f"tensor {name}: wrong shape",
        where=str(path),
        expected=list(expected) if isinstance(expected, tuple) else expected,
        found=list(found),
        remedy="The vocabulary has grown: merge it with PEFT first." if vocabulary else None,
    )
