"""The quantized checkpoint: what becomes of every tensor, and all files besides the shards.

What streaming and calibrated runs share. Knows nothing of how a weight is rounded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qmix
from qmix import strict_json
from qmix.config import MixtralConfig
from qmix.errors import UnsupportedError
from qmix.files import atomic_file
from qmix.formats import Checkpoint
from qmix.formats.files import manifest
from qmix.formats.files.companions import copy_companions
from qmix.formats.files.shards import check_finite
from qmix.formats.layouts import gptq_config, writer
from qmix.formats.layouts.headers import LAYOUT_OF
from qmix.formats.makers import made_by
from qmix.formats.names import ModelTensor
from qmix.formats.tensor_spec import TensorSpec
from qmix.hub.local import shown_name
from qmix.quantize.adapter import facts_of
from qmix.quantize.model_card import PAGE, model_card
from qmix.quantize.report import QuantizeReport
from qmix.quantize.source_card import stated_license
from qmix.weights.dense import Dense, Weight
from qmix.weights.scheme import Recipe, Scheme
from qmix.weights.table import Table

# Scales of integer weights: what GPTQ files hold, and three bits finer than bfloat16.
_SCALE_DTYPE = torch.float16
_ERROR_ROWS = 1024  # rows compared at a time, which limits the float32 copies to 117 MB for w2


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the model and what it will become.

    Attributes:
        dtype: of the weight in 16 bits, before or without quantization.
        planned: the tensors of the file that will hold it.
    """

    tensor: ModelTensor
    scheme: Scheme
    dtype: torch.dtype
    planned: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that it will take in the file."""
        return sum(planned.nbytes for planned in self.planned)


def plan_outputs(
    checkpoint: Checkpoint, recipe: Recipe, *, requantize: bool = False
) -> list[OutputTensor]:
    """What becomes of every tensor, in the model's order.

    Args:
        requantize: round what a quantized source decodes to.

    Raises:
        UnsupportedError: the source is quantized already, or a scheme does not fit a weight's
        shape.
    """
    outputs = []
    for tensor in checkpoint.tensors:
        if checkpoint.packed(tensor) and not requantize:
            raise _quantized_already(checkpoint, tensor)
        scheme = recipe.scheme_of(tensor.name)
        dtype = checkpoint.rounded_dtype(tensor)
        planned = planned_tensors(tensor, scheme, dtype)
        outputs.append(OutputTensor(tensor, scheme, dtype, planned))
    writer.layout_of({output.tensor.prefix: output.scheme for output in outputs})
    return outputs


def _quantized_already(checkpoint: Checkpoint, tensor: ModelTensor) -> UnsupportedError:
    """The refusal of a quantized source, which says what it is."""
    metadata, packing = checkpoint.metadata, checkpoint.packing(tensor)
    assert packing is not None
    maker = made_by(metadata)
    return UnsupportedError(
        "the source is quantized already",
        where=str(checkpoint.shards.directory),
        expected="16- or 32-bit weights",
        found=f"{tensor.name} as {packing.layout}, {metadata.scheme_of(packing)}"
        + (f"; made by {maker}" if maker else ""),
        remedy="qmix export writes the same weights in another layout. --requantize rounds what "
        "they decode to, which adds its errors to theirs; the original checkpoint loses less.",
    )


def planned_tensors(
    tensor: ModelTensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[TensorSpec, ...]:
    """The tensors that the file will hold of a weight; `dtype` is that of the 16-bit weight."""
    stored_dtype = _SCALE_DTYPE if scheme.integer else dtype
    return writer.packed_specs(tensor.prefix, tensor.shape, scheme, stored_dtype)


def read_finite(checkpoint: Checkpoint, tensor: ModelTensor) -> Tensor:
    """Read a weight of the source.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    data = checkpoint.dense(tensor)
    check_finite(tensor.name, checkpoint.file_of(tensor), data)
    return data


def file_tensors(weight: Weight, output: OutputTensor) -> dict[str, Tensor]:
    """The tensors that the file holds of a weight, by name, in the planned dtypes."""
    if isinstance(weight, Dense):
        weight = replace(weight, data=weight.data.to(output.dtype))
    elif isinstance(weight, Table):
        weight = replace(weight, out_dtype=output.dtype)
    return writer.pack(weight, output.tensor.prefix)


def squared_sums(data: Tensor, weight: Weight) -> tuple[float, float]:
    """The sums of (W - Q(W))^2 and of W^2; both 0 if nothing was rounded."""
    if isinstance(weight, Dense):
        return 0.0, 0.0
    error = norm = 0.0
    for start in range(0, data.shape[0], _ERROR_ROWS):
        stop = min(start + _ERROR_ROWS, data.shape[0])
        exact = data[start:stop].to(torch.float32, copy=True)
        norm += float(torch.linalg.vector_norm(exact)) ** 2
        exact -= weight.rows(start, stop, torch.float32)
        error += float(torch.linalg.vector_norm(exact)) ** 2
    return error, norm


def complete(
    folder: Path,
    checkpoint: Checkpoint,
    outputs: Sequence[OutputTensor],
    report: QuantizeReport,
    facts: Mapping[str, Any],
    *,
    documents: bool = False,
) -> None:
    """Write every file of a checkpoint but its shards: companions, config, report and manifest.

    Args:
        facts: entries of the manifest besides those that every quantization has.
        documents: write the model card and the page of the report too.
    """
    copy_companions(checkpoint.shards.directory, folder)
    dtype = outputs[0].dtype
    schemes = {output.tensor.prefix: output.scheme for output in outputs if output.tensor.linear}
    settings = writer.quantization_config(schemes, dtype)
    config = _without_settings(checkpoint).replace(
        dtype=str(dtype).removeprefix("torch."), quantization_config=settings
    )
    config.save_pretrained(folder)
    if settings is not None and writer.layout_of(schemes) == "GPTQ":
        strict_json.write(folder / gptq_config.FILE, settings)  # older readers look for it there
    strict_json.write(folder / manifest.REPORT, report.to_dict())
    if documents:
        every = {**facts_of(checkpoint), **facts}
        _write_documents(folder, checkpoint.shards.directory, report, every)
    manifest.write_manifest(
        folder,
        {
            "qmix": qmix.__version__,
            "method": report.method,
            "source": shown_name(checkpoint.shards.directory),
            "schemes": sorted({str(output.scheme) for output in outputs}),
            **facts_of(checkpoint),
            **facts,
        },
    )


def _write_documents(
    folder: Path, source: Path, report: QuantizeReport, facts: Mapping[str, Any]
) -> None:
    """What people read: the card, and the page with pictures."""
    from qmix.pages.page import html
    from qmix.quantize.report_page import report_page

    name, origin = folder.name.removesuffix(".partial"), shown_name(source)
    license = stated_license(source if source.is_dir() else source.parent)
    card = model_card(name, origin, report, facts, license, qmix.__version__)
    atomic_file.write(folder / manifest.CARD, card.encode("utf-8", "replace"))
    page = report_page(report, name, origin, qmix.__version__)
    atomic_file.write(folder / PAGE, html(page))


def _without_settings(checkpoint: Checkpoint) -> MixtralConfig:
    """The source's config without what describes its own quantization."""
    packings = map(checkpoint.packing, checkpoint.tensors)
    described = {LAYOUT_OF[packing.layout].field for packing in packings if packing is not None}
    config = checkpoint.config.replace(quantization_config=None)
    return config.replace(extra={n: v for n, v in config.extra.items() if n not in described})
