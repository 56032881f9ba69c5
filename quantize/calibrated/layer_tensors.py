"""The tensors of one layer: as they are in the source, and as they were rounded.

Shape letters: K inputs of a matrix, N outputs of one or several. Knows the checkpoint, but nothing
of tokens or of what a layer computes.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qmix.formats import Checkpoint, names
from qmix.nn.linear import Linear
from qmix.quantize.calibrated.layer_work import SOLVE, LayerWork, schemes_of
from qmix.quantize.calibrated.rounded_tensor import RoundedTensor
from qmix.quantize.output_checkpoint import read_finite, squared_sums
from qmix.quantize.rounding import gptq
from qmix.quantize.rounding.hessian import Moments
from qmix.weights.dense import Dense, Weight
from qmix.weights.scheme import Recipe, Scheme
from qmix.work_meter import WorkMeter


@dataclass(frozen=True, eq=False)
class RoundingJob:
    """Matrices that have the same inputs.

    Attributes:
        names: of their tensors.
        gradients: second moments of the gradients with respect to their outputs, [N, N] for all of
            them together; None: outputs are rounded independently of one another.
    """

    names: Sequence[str]
    moments: Moments
    gradients: Tensor | None = None


class LayerTensors:
    """The tensors of layer `layer`, by name.

    Args:
        device, dtype: of exact weights, and of the dense ones among the rounded.
        work: how much the solves are. meter: counts them.
        processes: how many round matrices of this layer side by side.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layer: int,
        recipe: Recipe,
        work: LayerWork,
        *,
        device: torch.device,
        dtype: torch.dtype,
        meter: WorkMeter,
        processes: int = 1,
    ) -> None:
        self._checkpoint, self._recipe = checkpoint, recipe
        self._work, self._options = work, work.options
        self._device, self._dtype, self._meter = device, dtype, meter
        self._processes = processes
        self._what = f"layer {layer + 1} of {checkpoint.config.num_hidden_layers}"
        self._tensors = {t.name: t for t in names.layer_tensors(checkpoint.config, layer)}
        self._results: dict[str, RoundedTensor] = {}
        self._kept: dict[str, Tensor] = {}

    @property
    def results(self) -> tuple[RoundedTensor, ...]:
        """What became of every tensor, in the model's order."""
        return tuple(self._results[name] for name in self._tensors)

    def let_go(self) -> None:
        """Forget what was kept of the source: these matrices are rounded."""
        self._kept.clear()

    def exact(self, name: str) -> Dense:
        """A weight as it is in the source."""
        return Dense(self._read(name).to(self._device, self._dtype))

    def rounded(self, name: str) -> Weight:
        """A weight as it was rounded."""
        weight = self._results[name].weight.to(self._device)
        return Dense(weight.data.to(self._dtype)) if isinstance(weight, Dense) else weight

    def store(self, linear: nn.Module, name: str) -> None:
        """Give a module its rounded weight."""
        assert isinstance(linear, Linear)
        linear.store(self.rounded(name))

    def leave_dense(self, name: str) -> None:
        """Keep a tensor as it is."""
        self._results[name] = RoundedTensor(
            tensor=self._tensors[name], weight=Dense(self._read(name))
        )

    def as_it_is(self, name: str) -> Dense:
        """The weight of a tensor that is never rounded, in the source's dtype, on the CPU."""
        if name not in self._results:
            self.leave_dense(name)
        weight = self._results[name].weight
        assert isinstance(weight, Dense)
        return weight

    def of(self, rounded: Sequence[str]) -> list[RoundedTensor]:
        """What became of some tensors that were rounded."""
        return [self._results[name] for name in rounded]

    def accept(self, rounded: Sequence[RoundedTensor]) -> None:
        """Take tensors of this layer that another process has rounded."""
        self._results |= {each.tensor.name: each for each in rounded}

    def take(self, weights: Mapping[str, Weight]) -> None:
        """Take weights that were rounded before, by name; all others stay as they are."""
        for name, tensor in self._tensors.items():
            if name in weights:
                self._results[name] = RoundedTensor(tensor=tensor, weight=weights[name])
            else:
                self.leave_dense(name)

    def round(self, jobs: Sequence[RoundingJob]) -> None:
        """Round matrices. Those of a job share their inputs; those of one scheme are stacked."""
        batches: dict[tuple[Scheme, int], list[RoundingJob]] = {}
        for job in jobs:
            schemes = schemes_of(job.names, self._recipe)
            for index, (scheme, members) in enumerate(schemes.items()):
                moments = job.moments if index == 0 else job.moments.copy()
                part = RoundingJob(members, moments, self._gradients_of(job, members))
                batches.setdefault((scheme, len(members)), []).append(part)
        for (scheme, _), batch in batches.items():
            if scheme.kind == "dense":
                for job in batch:
                    for name in job.names:
                        self.leave_dense(name)
            else:
                self._solve(scheme, batch)

    def _gradients_of(self, job: RoundingJob, members: Sequence[str]) -> Tensor | None:
        """The part of a job's gradients that belongs to some of its matrices."""
        if job.gradients is None or len(members) == len(job.names):
            return job.gradients
        sizes = [self._tensors[name].shape[0] for name in job.names]
        rows = dict(zip(job.names, torch.arange(sum(sizes)).split_with_sizes(sizes), strict=True))
        chosen = torch.cat([rows[name] for name in members]).to(job.gradients.device)
        return job.gradients[chosen][:, chosen]

    def _solve(self, scheme: Scheme, batch: Sequence[RoundingJob]) -> None:
        begun = time.perf_counter()
        first = batch[0].names
        rows = [self._tensors[name].shape[0] for name in first]
        work = self._work.solve(self._tensors[first[0]].shape[1], sum(rows), len(batch))
        gradients = [job.gradients for job in batch if job.gradients is not None]
        with self._meter.doing(self._what, SOLVE, work * self._processes) as tell:
            stacked = [torch.cat([self._read(name) for name in job.names]) for job in batch]
            solutions = gptq.solve(
                torch.stack([weight.to(self._device) for weight in stacked]),
                [job.moments for job in batch],
                scheme,
                self._options.rounding,
                where=[self._where(job.names[0]) for job in batch],
                parts=rows,
                output_moments=gradients or None,
                tell=tell,
            )
        seconds = (time.perf_counter() - begun) / (len(batch) * len(first))
        for job, source, parts in zip(batch, stacked, solutions, strict=True):
            exact = source.split_with_sizes(rows)
            for name, weight, solution in zip(job.names, exact, parts, strict=True):
                self._results[name] = RoundedTensor(
                    tensor=self._tensors[name],
                    weight=solution.weight,
                    tokens=job.moments.tokens,
                    solution=solution,
                    squared=squared_sums(weight, solution.weight),
                    seconds=seconds,
                )

    def _where(self, name: str) -> str:
        return f"{self._checkpoint.file_of(self._tensors[name])}: {name}"

    def _read(self, name: str) -> Tensor:
        """A tensor of the source. It is read three times while it is rounded.

        A GPU's host has memory to keep it until `let_go`; a CPU's needs that for the rounding.
        """
        if name in self._kept:
            return self._kept[name]
        data = read_finite(self._checkpoint, self._tensors[name])
        if self._device.type != "cpu":
            self._kept[name] = data
        return data
