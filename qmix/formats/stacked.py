"""Stacked experts: a tensor that holds one matrix of all experts of a layer, taken apart.

MLX stacks experts under `switch_mlp`, GGUF under `ffn_up_exps`, transformers 5 under
`experts.gate_up_proj` and `experts.down_proj`, where a layer is not brought back into the hub's
names while it is saved. The matrices of such a tensor lie one after another, so each expert's is a
range of its bytes and needs no other reader. Knows no torch and no bits.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from qmix.config import MixtralConfig
from qmix.formats.files.safetensors_header import TensorInfo
from qmix.formats.tensor_errors import wrong_shape

_MLX = re.compile(r"(.*\.switch_mlp\.(?:gate|up|down)_proj)\.(weight|scales|biases|global_scale)")
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")


def unstacked(infos: Mapping[str, TensorInfo], config: MixtralConfig) -> dict[str, TensorInfo]:
    """The tensors with every stack replaced by its experts' matrices.

    The e-th of `X.switch_mlp.up_proj.scales` becomes `X.switch_mlp.up_proj[e].scales`; that of
    `X.experts.gate_up_proj` becomes `X.experts.gate_up_proj[e].gate` and `.up`. The canonical names
    of these are the classic ones of the hub.

    Raises:
        CheckpointError: a stack that does not hold the experts of the config's model.
    """
    parts: dict[str, TensorInfo] = {}
    for name, info in infos.items():
        if match := _MLX.fullmatch(name):
            parts.update(_mlx_parts(name, info, config, *match.groups()))
        elif match := _FUSED.fullmatch(name):
            parts.update(_fused_parts(name, info, config, *match.groups()))
        else:
            parts[name] = info
    return parts


def _mlx_parts(
    name: str, info: TensorInfo, config: MixtralConfig, module: str, part: str
) -> Iterator[tuple[str, TensorInfo]]:
    rows = config.hidden_size if module.endswith("down_proj") else config.intermediate_size
    inner: tuple[int | None, ...] = () if part == "global_scale" else (rows, None)
    for expert, matrix in enumerate(matrices(name, info, config, inner)):
        yield f"{module}[{expert}].{part}", matrix


def _fused_parts(
    name: str, info: TensorInfo, config: MixtralConfig, block: str, part: str
) -> Iterator[tuple[str, TensorInfo]]:
    hidden, width = config.hidden_size, config.intermediate_size
    if part == "down_proj":
        for expert, matrix in enumerate(matrices(name, info, config, (hidden, width))):
            yield f"{block}.{part}[{expert}]", matrix
        return
    for expert, matrix in enumerate(matrices(name, info, config, (2 * width, hidden))):
        middle = (matrix.start + matrix.stop) // 2
        gate = replace(matrix, shape=(width, hidden), stop=middle)
        yield f"{block}.{part}[{expert}].gate", gate
        yield f"{block}.{part}[{expert}].up", replace(gate, start=middle, stop=matrix.stop)


def matrices(
    name: str,
    info: TensorInfo,
    config: MixtralConfig,
    inner: tuple[int | None, ...],
    *,
    description: str = "config.json",
) -> Iterator[TensorInfo]:
    """The experts' tensors of a stack [E, ...].

    Args:
        inner: the shape of one; None stands for any size but 0.
        description: what describes the model, for errors.

    Raises:
        CheckpointError: another shape.
    """
    experts = config.num_local_experts
    known = len(info.shape) == 1 + len(inner) and all(
        found == wanted or (wanted is None and found > 0)
        for found, wanted in zip(info.shape, (experts, *inner), strict=True)
    )
    if not known:
        expected = [experts, *("any" if size is None else size for size in inner)]
        raise wrong_shape(str(info.file), name, expected, info.shape, description=description)
    nbytes = info.nbytes // experts
    for start in range(info.start, info.stop, nbytes):
        yield replace(info, shape=info.shape[1:], start=start, stop=start + nbytes)
