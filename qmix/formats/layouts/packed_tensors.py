"""The tensors of one packed weight, as the headers of its files describe them. Knows no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from qmix.formats.files.safetensors_header import TensorInfo
from qmix.formats.layouts.tensor_names import Layout
from qmix.formats.names import ModelTensor


@dataclass(frozen=True, kw_only=True)
class PackedTensors:
    """The tensors of one packed weight, as headers describe them.

    Attributes:
        layout: by its name.
        tensor: the model's weight.
        module: the module's name in the files.
        names: the canonical names of its tensors; those that the layout requires are among them
            even if the files lack them.
        infos: of those that the files have, by what follows the module's name, without its dot.
    """

    layout: Layout
    tensor: ModelTensor
    module: str
    names: tuple[str, ...]
    infos: Mapping[str, TensorInfo]

    @property
    def matrix(self) -> tuple[int, int]:
        """(N, K) of the model's weight."""
        return self.tensor.shape[0], self.tensor.shape[1]

    def shape(self, part: str) -> tuple[int, ...]:
        """The shape of one of the tensors; () if the files lack it."""
        return self.infos[part].shape if part in self.infos else ()

    def dtype(self, part: str) -> str | None:
        """The dtype of one of the tensors; None if the files lack it."""
        return self.infos[part].dtype if part in self.infos else None

    @property
    def dense(self) -> bool:
        """Whether the weight is a source that is dequantized while it is read, as FP8 is."""
        return self.layout == "FP8"

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape of the scales of compressed-tensors, ModelOpt and FP8."""
        return self.shape("weight_scale") or self.shape("weight_scale_inv")
