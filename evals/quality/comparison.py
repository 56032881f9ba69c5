"""Several checkpoints of one model on a text, each beside one of them, the reference.

All are run layer by layer, with one layer of one of them in memory at a time, so that their hidden
states can be compared after each. Shape letters: L layers, E experts. Knows nothing of pages.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmix.errors import CheckpointError
from qmix.evals.quality.layer_streaming import Scorer
from qmix.evals.quality.perplexity import Perplexity
from qmix.evals.quality.positions import PositionScore
from qmix.evals.quality.texts import Text
from qmix.evals.quality.token_scores import TokenScores, token_scores
from qmix.evals.quality.windows import ScoringWindows, open_comparable, text_windows
from qmix.evals.quality.worst_tokens import WorstToken, worst_tokens
from qmix.formats import Checkpoint, open_checkpoint
from qmix.formats.names import place
from qmix.formats.readers.storage import storage_summary
from qmix.hub.local import shown_name
from qmix.models.options import parse_dtype
from qmix.quantize.output_checkpoint import squared_sums
from qmix.text.tokenizer import LlamaTokenizer

_ALIKE = ("num_hidden_layers", "hidden_size", "num_local_experts")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class ReferenceDistance:
    """How far a model is from the reference.

    Attributes:
        positions: KL by position in the window.
        layer_errors: for each layer, |h - h_ref| / |h_ref| of the hidden states that leave it, the
            mean over tokens. Errors of earlier layers are in it.
        weight_errors: |W - W_ref| / |W_ref| in the Frobenius norm, by the last part of the names;
            only of weights that are not stored in 16 or 32 bits.
        worst: the tokens of largest KL, the largest first.
    """

    positions: tuple[PositionScore, ...]
    layer_errors: tuple[float, ...]
    weight_errors: Mapping[str, float]
    worst: tuple[WorstToken, ...]


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """One checkpoint of a comparison.

    Attributes:
        path: as given.
        name: as people call it.
        nbytes: of the stored weights.
        parameters: number of weights.
        bits: of every matrix by its name, scales included.
        expert_tokens: L x E, how many of the text's tokens went through each expert.
        distance: None for the reference itself.
    """

    path: Path
    name: str
    nbytes: int
    parameters: int
    bits: Mapping[str, float]
    score: Perplexity
    expert_tokens: tuple[tuple[int, ...], ...]
    distance: ReferenceDistance | None

    @property
    def bits_per_weight(self) -> float:
        """Over all weights, those in 16 bits included."""
        return 8 * self.nbytes / self.parameters

    @property
    def mixed(self) -> bool:
        """Whether its experts' matrices have different numbers of bits."""
        return len({bits for name, bits in self.bits.items() if place(name).expert is not None}) > 1

    def to_dict(self) -> dict[str, Any]:
        """The figures as a JSON document."""
        return {
            "path": str(self.path),
            "name": self.name,
            "bytes": self.nbytes,
            "parameters": self.parameters,
            "bits_per_weight": round(self.bits_per_weight, 4),
            **self.score.to_dict(),
            "expert_tokens": [list(layer) for layer in self.expert_tokens],
            "distance": None if self.distance is None else asdict(self.distance),
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All checkpoints of a comparison, the reference first.

    Attributes:
        chosen: experts that a token goes through in a layer.
        dtype, device: of the computation, in words.
    """

    models: tuple[ModelResult, ...]
    chosen: int
    dtype: str
    device: str

    @property
    def reference(self) -> ModelResult:
        return self.models[0]

    def to_dict(self) -> dict[str, Any]:
        """The stable JSON document of `qmix compare --json`."""
        return {
            "dtype": self.dtype,
            "device": self.device,
            "models": [model.to_dict() for model in self.models],
        }


def compare(
    directories: Sequence[Path],
    text: Text,
    *,
    window: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Comparison:
    """Score a text with every checkpoint, and compare each with the first.

    Args:
        directories: the reference, then all others.
        window: tokens of a window; by default the model's positions, at most 2048.
        dtype: of the computation of all models; by default the reference's.
        device: as `qmix.LoadOptions`.
        progress: called with what comes next, the steps done and all steps.

    Raises:
        UsageError: the window is out of range, or the text is too short.
        CheckpointError: a checkpoint is damaged, or is not of the reference's shape or tokenizer.
        ResourceError: too little memory for the windows of all models and one layer.
    """
    asked = parse_dtype(dtype)
    names = [shown_name(path) for path in directories]
    tokenizer = LlamaTokenizer.from_pretrained(directories[0])
    opened, windows = _opened(directories, text, tokenizer, window)
    config, weight_dtype = opened[0].config, asked or opened[0].dtype
    steps = _Steps(progress, len(opened) * (2 * config.num_hidden_layers + 1))
    scorers = [Scorer(each, windows.ids, dtype=weight_dtype, device=device) for each in opened]
    expert_tokens, layer_errors = _run_layers(scorers, names, steps)
    scores = _scores(scorers, names, windows, steps)
    worst = [
        worst_tokens(windows, score, scorer, scorers[0], tokenizer)
        for score, scorer in zip(scores, scorers, strict=True)
    ]
    where = str(scorers[0].device)
    scorers.clear()  # and with them the hidden states
    weight_errors = _weight_errors(opened, steps)
    models = []
    for index, score in enumerate(scores):
        overall = Perplexity.of(score, windows, text.sha256)
        far = ReferenceDistance(
            positions=overall.positions,
            layer_errors=layer_errors[index],
            weight_errors=weight_errors[index],
            worst=worst[index],
        )
        distance = far if index else None
        models.append(
            _result(directories[index], opened[index], overall, expert_tokens[index], distance)
        )
    return Comparison(
        models=tuple(models),
        chosen=config.num_experts_per_tok,
        dtype=str(weight_dtype).removeprefix("torch."),
        device=where,
    )


def _result(
    path: Path,
    checkpoint: Checkpoint,
    score: Perplexity,
    expert_tokens: tuple[tuple[int, ...], ...],
    distance: ReferenceDistance | None,
) -> ModelResult:
    schemes = storage_summary(checkpoint.metadata).schemes
    return ModelResult(
        path=path,
        name=shown_name(path),
        nbytes=sum(map(checkpoint.stored_bytes, checkpoint.tensors)),
        parameters=sum(prod(tensor.shape) for tensor in checkpoint.tensors),
        bits={name: scheme.bits_per_weight for name, scheme in schemes.items()},
        score=score,
        expert_tokens=expert_tokens,
        distance=distance,
    )


def _opened(
    directories: Sequence[Path], text: Text, tokenizer: LlamaTokenizer, window: int | None
) -> tuple[list[Checkpoint], ScoringWindows]:
    """The checkpoints, all of the first's shape, tokenizer and vocabulary; the text's windows."""
    reference = open_checkpoint(directories[0])
    ids = tokenizer.encode(text.content)
    windows = text_windows(reference, tokenizer, ids, window)
    opened = [reference]
    for path in directories[1:]:
        opened.append(open_comparable(path, reference, text.content, ids))
        _check_alike(path, opened[-1], reference)
    return opened, windows


class _Steps:
    """Counts the steps of a comparison for its progress."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def next(self, what: str) -> None:
        self._progress(what, self._done, self._total)
        self._done += 1


def _check_alike(path: Path, checkpoint: Checkpoint, reference: Checkpoint) -> None:
    for field in _ALIKE:
        expected, found = getattr(reference.config, field), getattr(checkpoint.config, field)
        if found != expected:
            raise CheckpointError(
                "not of the reference's shape",
                where=f"{path}, {field}",
                expected=expected,
                found=found,
                remedy="Compare versions of one model.",
            )


def _run_layers(
    scorers: Sequence[Scorer], names: Sequence[str], steps: _Steps
) -> tuple[list[tuple[tuple[int, ...], ...]], list[tuple[float, ...]]]:
    """Run all layers of all models, layer by layer.

    Returns:
        For each model the tokens of its experts, L x E, and its distance after each layer.
    """
    tokens: list[list[tuple[int, ...]]] = [[] for _ in scorers]
    errors: list[list[float]] = [[] for _ in scorers]
    for layer in range(scorers[0].layers):
        for index, scorer in enumerate(scorers):
            steps.next(f"{names[index]}, layer {layer}")
            tokens[index].append(tuple(scorer.advance().tolist()))
            errors[index].append(_relative_error(scorer.hidden, scorers[0].hidden))
    return [tuple(each) for each in tokens], [tuple(each) for each in errors]


def _relative_error(hidden: Tensor, reference: Tensor) -> float:
    """|h - h_ref| / |h_ref| of hidden states (W, S, D), the mean over tokens."""
    total = 0.0
    for mine, base in zip(hidden, reference, strict=True):
        exact = base.float()
        norms = torch.linalg.vector_norm(exact, dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        total += float((torch.linalg.vector_norm(mine.float() - exact, dim=-1) / norms).sum())
    return total / hidden.shape[:2].numel()


def _scores(
    scorers: Sequence[Scorer], names: Sequence[str], windows: ScoringWindows, steps: _Steps
) -> list[TokenScores]:
    """The scored tokens of every model, the reference beside itself too."""
    scores = []
    for name, scorer in zip(names, scorers, strict=True):
        steps.next(f"{name}, all tokens' scores")
        reference = None if scorer is scorers[0] else scorers[0]
        scores.append(token_scores(windows, scorer, reference))
    return scores


def _weight_errors(opened: Sequence[Checkpoint], steps: _Steps) -> list[dict[str, float]]:
    """For each model, the relative error of its quantized weights by the last part of the name.

    Each of the reference's weights is read once. The layers are the steps, those of each model.
    """
    sums: list[dict[str, tuple[float, float]]] = [{} for _ in opened]
    layer = None
    for tensor in opened[0].tensors:
        if tensor.layer is not None and tensor.layer != layer:
            layer = tensor.layer
            for _ in opened:
                steps.next(f"weights, layer {layer}")
        quantized = [index for index, each in enumerate(opened) if index and each.packed(tensor)]
        if not quantized:
            continue
        exact = opened[0].dense(tensor)
        for index in quantized:
            error, norm = squared_sums(exact, opened[index].weight(tensor))
            before = sums[index].get(place(tensor.name).part, (0.0, 0.0))
            sums[index][place(tensor.name).part] = before[0] + error, before[1] + norm
    return [
        {part: (error / norm) ** 0.5 for part, (error, norm) in each.items() if norm}
        for each in sums
    ]
