"""Which form of a weight each layout holds, and what stands in the way: decided from the weight.

A `Fitting` gives the forms in which its layout holds a weight exactly, the weight in one of them,
and the form to which it would have to be rounded. Knows no tensors' names and no files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from qmix.formats.layouts.fp4 import e4m3, e8m0
from qmix.formats.layouts.gguf_blocks import BLOCK, DENSE_TYPES
from qmix.formats.layouts.gguf_schemes import SCHEMES
from qmix.weights import forms
from qmix.weights.affine import Affine
from qmix.weights.dense import Weight
from qmix.weights.forms import InexactError
from qmix.weights.scales import NestedScales
from qmix.weights.scheme import DENSE, GROUP_SIZES, NF4, Kind, Scheme
from qmix.weights.table import Table

_KINDS: dict[int, Kind] = {2: "int2", 3: "int3", 4: "int4", 8: "int8"}
_SIZES = tuple(reversed(GROUP_SIZES))
_TILE_ROWS = 1024


@dataclass(frozen=True)
class Form:
    """How a weight lies in a file.

    Attributes:
        scheme: its scheme.
        dtype: of the scales, of a dense weight, or of what a table weight was before.
        type: GGUF's name of it; "" elsewhere.
    """

    scheme: Scheme
    dtype: torch.dtype
    type: str = ""


class Fitting(Protocol):
    """What one layout holds of weights that are packed."""

    def forms(self, weight: Weight, *, exact: bool = True) -> tuple[Form, ...]:
        """The forms of a weight in this layout, the best first.

        Args:
            exact: False also rounds scales, zeros and biases; codes are never rounded.

        Raises:
            InexactError: there is none.
        """

    def fit(self, weight: Weight, form: Form, *, exact: bool = True) -> Weight:
        """The weight in one of its forms."""

    def rounded(self, bits: int, group: int, dtype: torch.dtype) -> Form:
        """The form for weights whose codes are rounded anew.

        Args:
            bits: of their codes.
            group: inputs that shared a scale, or a common divisor of several such numbers.
            dtype: of the model.
        """


@dataclass(frozen=True)
class IntegerFitting:
    """GPTQ, AWQ and compressed-tensors: plain scales, zeros that are codes.

    Attributes:
        bits: of the codes that are written.
        zeros: whether zeros may differ from half of the range, and the least of them; None if not.
        order: whether the inputs of a group may be scattered.
        lanes: whether outputs, as inputs, must fill whole words.
        sizes: whether all weights of a checkpoint share one group size, and count as asymmetric: a
            weight is then offered with smaller groups too.
    """

    bits: tuple[int, ...]
    zeros: int | None = None
    order: bool = False
    lanes: bool = True
    sizes: bool = False

    def forms(self, weight: Weight, *, exact: bool = True) -> tuple[Form, ...]:
        weight = self._converted(weight, exact=exact)
        sizes = [weight.scheme.group_size]
        if self.sizes:
            sizes += [size for size in _SIZES if weight.group_inputs % size == 0]
        symmetric = weight.symmetric and not self.sizes
        return tuple(
            Form(
                Scheme(kind=_KINDS[weight.bits], group_size=size, symmetric=symmetric), weight.dtype
            )
            for size in dict.fromkeys(sizes)
        )

    def fit(self, weight: Weight, form: Form, *, exact: bool = True) -> Weight:
        weight = self._converted(weight, exact=exact)
        size = form.scheme.group_size
        return forms.in_groups(weight, (weight.shape[1] if size == -1 else size,))

    def rounded(self, bits: int, group: int, dtype: torch.dtype) -> Form:
        kind = _KINDS[min(bits, max(self.bits))]
        symmetric = not self.sizes
        return Form(
            Scheme(kind=kind, group_size=_nearest(group), symmetric=symmetric), torch.float16
        )

    def _converted(self, weight: Weight, *, exact: bool) -> Affine:
        affine = _affine(weight)
        if affine.bits not in self.bits:
            raise InexactError(f"codes of {affine.bits} bits")
        if not self.order:
            affine = forms.in_order(affine)
        plain = (affine.dtype,) if isinstance(affine.scales, Tensor) else ()
        affine = forms.with_plain_scales(affine, (*plain, *forms.HALVES), exact=exact)
        affine = forms.with_zeros(affine)
        if affine.zeros is not None:
            if self.zeros is None:
                raise InexactError("zeros")
            if bool((affine.zeros < self.zeros).any()):
                raise InexactError(f"zeros below {self.zeros}")
        rows, columns = affine.shape
        lanes = 32 // affine.bits
        if columns % lanes or (self.lanes and rows % lanes):
            raise InexactError("widths that fill no whole words")
        return forms.in_groups(affine, (columns, *_SIZES))


@dataclass(frozen=True)
class MLXFitting:
    """MLX's affine mode: scales and biases of one dtype, for 32, 64 or 128 inputs; and its E2M1.

    The dtype has 16 bits, unless the biases are in 32 already.
    """

    def forms(self, weight: Weight, *, exact: bool = True) -> tuple[Form, ...]:
        if isinstance(weight, Table) and _is_mlx_table(weight):
            return (Form(weight.scheme, weight.dtype),)
        affine = self._converted(weight, exact=exact)
        sizes = [size for size in _SIZES if affine.group_inputs % size == 0]
        return tuple(Form(_mlx_scheme(affine.bits, size), affine.dtype) for size in sizes)

    def fit(self, weight: Weight, form: Form, *, exact: bool = True) -> Weight:
        if isinstance(weight, Table):
            return weight
        return forms.in_groups(self._converted(weight, exact=exact), (form.scheme.group_size,))

    def rounded(self, bits: int, group: int, dtype: torch.dtype) -> Form:
        return Form(_mlx_scheme(bits, _nearest(group)), torch.float16)

    def _converted(self, weight: Weight, *, exact: bool) -> Affine:
        affine = forms.in_order(_affine(weight))
        own = (affine.dtype,) if isinstance(affine.biases, Tensor) else ()
        affine = forms.with_biases(affine, (*forms.HALVES, *own), exact=exact)
        if affine.shape[1] * affine.bits % 32:
            raise InexactError("widths that fill no whole words")
        return forms.in_groups(affine, _SIZES)


def _is_mlx_table(weight: Table) -> bool:
    """Whether a weight is MLX's mxfp4 or nvfp4: scales of one byte, and no outer one."""
    scales = weight.scales
    if weight.kind != "e2m1" or not isinstance(scales, NestedScales):
        return False
    values = {32: e8m0(), 16: e4m3()}.get(weight.block_size)
    if values is None or scales.codes.shape != (
        weight.shape[0],
        weight.shape[1] // weight.block_size,
    ):
        return False
    used = torch.bincount(scales.codes.flatten(), minlength=256) > 0
    plain = scales.offset == 0 and bool((scales.outer == 1).all())
    return plain and not weight.high_first and torch.equal(scales.map[used], values[used])


def _mlx_scheme(bits: int, size: int) -> Scheme:
    return Scheme(kind=_KINDS[bits], group_size=size, symmetric=False, group_bits=32)


GGUFType = Literal["Q4_0", "Q4_1", "Q8_0", "IQ4_NL"]
_AFFINE_TYPES: tuple[GGUFType, ...] = ("Q4_0", "Q4_1", "Q8_0")


@dataclass(frozen=True)
class GGUFFitting:
    """GGUF's Q4_0, Q4_1, Q8_0 and IQ4_NL: float16 scales for 32 inputs."""

    def forms(self, weight: Weight, *, exact: bool = True) -> tuple[Form, ...]:
        if isinstance(weight, Table):
            self._iq4(weight)
            return (_gguf_form("IQ4_NL"),)
        found: list[Form] = []
        problems: list[InexactError] = []
        for kind in _AFFINE_TYPES:
            try:
                self._converted(_affine(weight), kind, exact=exact)
                found.append(_gguf_form(kind))
            except InexactError as error:
                problems.append(error)
        if not found:
            raise problems[1]  # Q4_1 holds the most kinds of weights
        return tuple(found)

    def fit(self, weight: Weight, form: Form, *, exact: bool = True) -> Weight:
        if isinstance(weight, Table):
            return self._iq4(weight)
        affine = self._converted(_affine(weight), form.type, exact=exact)
        return forms.in_bits(affine, form.scheme.bits)

    def rounded(self, bits: int, group: int, dtype: torch.dtype) -> Form:
        return _gguf_form("Q8_0" if bits == 8 else "Q4_0")

    def _converted(self, weight: Affine, kind: str, *, exact: bool) -> Affine:
        weight, dtypes = forms.in_order(weight), (torch.float16,)
        if kind != "Q8_0" and weight.bits > 4:
            raise InexactError(f"zeros or biases beside codes of {weight.bits} bits")
        if kind == "Q4_1":
            weight = forms.with_biases(weight, dtypes, exact=exact)
        else:
            weight = forms.with_zeros(forms.with_plain_scales(weight, dtypes, exact=exact))
            if not weight.symmetric:
                raise InexactError("zeros")
        if weight.shape[1] % BLOCK:
            raise InexactError("rows that are no whole blocks")
        return forms.in_groups(weight, (BLOCK,))

    def _iq4(self, weight: Table) -> Table:
        if weight.kind != "iq4":
            raise _table(weight)
        if not isinstance(weight.scales, Tensor):
            raise InexactError("nested scales")
        return weight


def _gguf_form(kind: GGUFType) -> Form:
    return Form(SCHEMES[kind], torch.float16, kind)


@dataclass(frozen=True)
class TableFitting:
    """bitsandbytes: its tables NF4 and FP4, as they are."""

    def forms(self, weight: Weight, *, exact: bool = True) -> tuple[Form, ...]:
        self.fit(weight, Form(DENSE, weight.dtype))
        return (Form(weight.scheme, weight.dtype),)

    def fit(self, weight: Weight, form: Form, *, exact: bool = True) -> Weight:
        if not isinstance(weight, Table):
            raise InexactError("integers in a layout of tables")
        if weight.kind not in ("nf4", "fp4"):
            raise InexactError(f"codes of another table ({weight.kind})")
        return weight

    def rounded(self, bits: int, group: int, dtype: torch.dtype) -> Form:
        return Form(NF4, dtype)


def dense_form(weight: Weight, dtypes: Sequence[torch.dtype], *, gguf: bool) -> Form:
    """The form of a weight that becomes dense: the first of `dtypes` that holds its values.

    Raises:
        InexactError: none of them does.
    """
    for dtype in dtypes:
        if all(torch.equal(rows.to(dtype).float(), rows) for rows in _tiles(weight)):
            return Form(DENSE, dtype, DENSE_TYPES[dtype] if gguf else "")
    raise InexactError("values that 16 bits do not hold")


def _tiles(weight: Weight) -> Iterator[Tensor]:
    """The values in float32, some rows at a time, which limits them to 17 MB for an embedding."""
    for start in range(0, weight.shape[0], _TILE_ROWS):
        yield weight.rows(start, min(start + _TILE_ROWS, weight.shape[0]), torch.float32)


def _affine(weight: Weight) -> Affine:
    if isinstance(weight, Table):
        raise _table(weight)
    assert isinstance(weight, Affine), type(weight)
    return forms.in_bits(weight, 8) if weight.bits in (5, 6) else weight


def _table(weight: Table) -> InexactError:
    return InexactError(f"codes of a table ({weight.kind}) in an affine layout")


def _nearest(group: int) -> int:
    """The group size for weights that are rounded anew."""
    return next((size for size in _SIZES if group % size == 0), _SIZES[-1])
