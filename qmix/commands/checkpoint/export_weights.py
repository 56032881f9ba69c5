"""Weights of a checkpoint in the forms of an export plan, one after another, and their errors.

A weight that keeps every bit is only moved; what is rounded is compared with what it was. Knows no
file and no names of tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qmix.commands.checkpoint.export_plan import PlannedWeight
from qmix.formats import Checkpoint
from qmix.formats.files.shards import check_finite
from qmix.formats.layouts.fitting import Fitting, Form
from qmix.quantize.rounding import rtn
from qmix.weights import nf4
from qmix.weights.dense import Dense, Weight
from qmix.weights.scheme import Scheme

_COMPARED_ROWS = 1024  # at a time, which limits the float32 copies to 117 MB for w2


@dataclass(frozen=True, kw_only=True)
class RoundedWeight:
    """What rounding did to one weight.

    Attributes:
        name: the module's.
        loss: what its new form does not keep.
        source, scheme: how it was stored, and how it is now.
        squared_error, squared_norm: sums over the weight.
        largest_error: of one value.
    """

    name: str
    loss: str
    source: str
    scheme: str
    squared_error: float
    squared_norm: float
    largest_error: float

    @property
    def relative_error(self) -> float:
        """`|W - Q(W)| / |W|` in the Frobenius norm."""
        return float((self.squared_error / self.squared_norm) ** 0.5) if self.squared_norm else 0.0

    def to_dict(self) -> Mapping[str, Any]:
        """The entry of the report."""
        return {
            "name": self.name,
            "loss": self.loss,
            "from": self.source,
            "to": self.scheme,
            "relative_error": self.relative_error,
            "largest_error": self.largest_error,
        }


class WeightConversion:
    """Converts weights as planned.

    Attributes:
        rounded: what was rounded so far.
    """

    def __init__(self, checkpoint: Checkpoint, fitting: Fitting) -> None:
        self._checkpoint, self._fitting = checkpoint, fitting
        self.rounded: list[RoundedWeight] = []

    def weight(self, planned: PlannedWeight) -> Weight:
        """One weight in its form.

        Raises:
            CheckpointError: the source is damaged.
        """
        weight = self._checkpoint.weight(planned.tensor)
        converted = self._converted(weight, planned)
        if planned.loss is not None:
            self.rounded.append(_compared(weight, converted, planned))
        return converted

    def _converted(self, weight: Weight, planned: PlannedWeight) -> Weight:
        form = planned.form
        if planned.step == "codes":
            where = f"{self._checkpoint.file_of(planned.tensor)}: {planned.tensor.name}"
            weight = _rounded(weight, form, where)
        elif form.scheme.kind == "dense":
            data = weight.dequantize(form.dtype)
            check_finite(planned.tensor.name, self._checkpoint.file_of(planned.tensor), data)
            return Dense(data)
        return self._fitting.fit(weight, form, exact=planned.step != "scales")


def _rounded(weight: Weight, form: Form, where: str) -> Weight:
    """A weight in new codes: NF4, or the nearest integers around a zero in the middle."""
    values = weight.dequantize(torch.float32)
    scheme = form.scheme
    if scheme.kind == "nf4":
        return nf4.quantize(values.to(form.dtype), scheme, where=where)
    symmetric = Scheme(kind=scheme.kind, group_size=scheme.group_size)
    return rtn.quantize(values, symmetric, where=where)


def _compared(weight: Weight, converted: Weight, planned: PlannedWeight) -> RoundedWeight:
    error = norm = largest = 0.0
    for start in range(0, weight.shape[0], _COMPARED_ROWS):
        stop = min(start + _COMPARED_ROWS, weight.shape[0])
        exact = weight.rows(start, stop, torch.float32)
        difference = converted.rows(start, stop, torch.float32) - exact
        norm += float(torch.linalg.vector_norm(exact)) ** 2
        error += float(torch.linalg.vector_norm(difference)) ** 2
        largest = max(largest, float(difference.abs().max()))
    return RoundedWeight(
        name=planned.tensor.prefix,
        loss=planned.loss or "",
        source=str(planned.source),
        scheme=str(converted.scheme),
        squared_error=error,
        squared_norm=norm,
        largest_error=largest,
    )
