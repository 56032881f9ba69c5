"""The same experts by other projects' kernels, if their packages are installed.

Each peer gets the routing as a host would know it, sorted and with fixed experts, so that it can be
recorded in a graph: the best case for it. The codes are random and of the right shapes; none of the
peers' code is here. Shape letters: P pairs of a token and an expert, N outputs, K inputs.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.evals.steps.moe_block import moe_result, random_inputs, random_routes, tokens_of
from qmix.evals.steps.setting import NotHereError, Setting
from qmix.kernels import Routes
from qmix.weights.table import NF4_VALUES

TOKENS = (1, 2, 4, 8, 16, 64)
GATHERED_TOKENS = (1, 2, 4)  # a gather copies the experts of every token

T = TypeVar("T")

# (x, expert, matrix) -> x through one of the expert's two matrices.
Matmul = Callable[[Tensor, int, int], Tensor]


def results(setting: Setting, peer: str) -> Iterator[dict[str, object]]:
    """One result for each number of tokens.

    Args:
        peer: the name of a function below.

    Raises:
        NotHereError: its package is not installed.
    """
    setting.release()
    peers: dict[str, Callable[[Setting], Iterator[dict[str, object]]]] = {
        each.__name__: each for each in (bitsandbytes, grouped_nf4_gemm, int4pack, gather, marlin)
    }
    try:
        yield from peers[peer](setting)
    except ImportError as error:
        raise NotHereError(f"not installed: {error}") from error


def bitsandbytes(setting: Setting) -> Iterator[dict[str, object]]:
    """NF4 with float32 absmax, an expert at a time."""
    functional: Any = importlib.import_module("bitsandbytes.functional")
    package: Any = importlib.import_module("bitsandbytes")
    table = torch.tensor(NF4_VALUES, device=setting.device)

    def matrix(rows: int, columns: int) -> tuple[Tensor, object]:
        codes, absmax = _nf4(rows, columns, setting.device)
        state = functional.QuantState(
            absmax=absmax.flatten(),
            shape=torch.Size((rows, columns)),
            code=table,
            blocksize=64,
            quant_type="nf4",
            dtype=torch.bfloat16,
        )
        return codes.view(-1, 1), state

    layers = _each_matrix(setting, matrix)

    def matmul(layer: int) -> Matmul:
        def multiply(x: Tensor, expert: int, which: int) -> Tensor:
            codes, state = layers[layer][expert][which]
            out: Tensor = package.matmul_4bit(x, codes.t(), quant_state=state)
            return out

        return multiply

    name = f"bitsandbytes {package.__version__} nf4"
    yield from _by_expert(setting, name, 4.5, matmul)


def grouped_nf4_gemm(setting: Setting) -> Iterator[dict[str, object]]:
    """NF4 with float32 absmax, all experts in one launch: its default and its decode kernel."""
    grouped: Any = importlib.import_module("nf4_grouped")
    layers = []
    for _ in range(setting.widths.turns):
        stacks = []
        for rows, columns in _shapes(setting):
            parts = [
                _nf4(rows, columns, setting.device)
                for _ in range(setting.widths.config.num_local_experts)
            ]
            codes = torch.stack([codes.view(rows, columns // 2) for codes, _ in parts])
            stacks.append((codes, torch.stack([absmax for _, absmax in parts])))
        layers.append(stacks)
    for bandwidth in ("", "1"):
        if bandwidth:
            os.environ["GNF4_GEMV_BW"] = bandwidth
        for tokens in tokens_of(setting, TOKENS):
            x, routes = random_inputs(setting, tokens), random_routes(setting, tokens)
            token, weights, sizes, experts = _sorted_pairs(setting, routes)

            def call(
                layer: int,
                x: Tensor = x,
                token: Tensor = token,
                weights: Tensor = weights,
                sizes: list[int] = sizes,
                experts: Tensor = experts,
            ) -> Callable[[], object]:
                (up, up_scale), (down, down_scale) = layers[layer]

                def block() -> Tensor:
                    hidden = grouped.gemm_4bit_grouped(x[token], up, up_scale, sizes, experts)
                    gate, up_part = hidden.chunk(2, -1)
                    inner = F.silu(gate) * up_part
                    y = grouped.gemm_4bit_grouped(inner, down, down_scale, sizes, experts)
                    out = torch.zeros(x.shape, device=x.device)
                    return out.index_add_(0, token, y.float() * weights).to(x.dtype)

                return block

            name = "grouped-nf4-gemm" + (f" GNF4_GEMV_BW={bandwidth}" if bandwidth else "")
            yield moe_result(
                setting,
                name,
                4.5,
                tokens,
                routes,
                [call(layer) for layer in range(setting.widths.turns)],
            )
    os.environ.pop("GNF4_GEMV_BW", None)


def int4pack(setting: Setting) -> Iterator[dict[str, object]]:
    """torch's own int4 matmul (tinygemm) in groups of 128, an expert at a time.

    Raises:
        NotHereError: it is another function, with other shapes, on a CPU.
    """
    if setting.device.type != "cuda":
        raise NotHereError("no CUDA device")

    def matrix(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        codes = torch.randint(
            0, 256, (rows, columns // 2), dtype=torch.uint8, device=setting.device
        )
        packed = torch._convert_weight_to_int4pack(codes, 8)
        scales = torch.full((columns // 128, rows, 2), 0.003, device=setting.device).bfloat16()
        return packed, scales

    layers = _each_matrix(setting, matrix)

    def matmul(layer: int) -> Matmul:
        def multiply(x: Tensor, expert: int, which: int) -> Tensor:
            packed, scales = layers[layer][expert][which]
            return torch._weight_int4pack_mm(x, packed, 128, scales)

        return multiply

    yield from _by_expert(setting, "torch._weight_int4pack_mm", 4.25, matmul)


def marlin(setting: Setting) -> Iterator[dict[str, object]]:
    """Marlin in gptqmodel's package, int4 in groups of 128, an expert at a time.

    Some versions compile it with nvcc at the first call, which takes longer than the step may.
    """
    module: Any = importlib.import_module("gptqmodel.utils.marlin")
    types: Any = importlib.import_module("gptqmodel.utils.marlin_scalar_type")
    device, dtype = setting.device, setting.widths.dtype
    workspace = module.marlin_make_workspace_new(device)
    nothing = torch.empty(0, dtype=torch.int32, device=device)

    def matrix(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        shape = (columns // 16, 2 * rows)
        codes = torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int32, device=device)
        return codes, torch.full((columns // 128, rows), 0.003, dtype=dtype, device=device)

    layers = _each_matrix(setting, matrix)

    def matmul(layer: int) -> Matmul:
        def multiply(x: Tensor, expert: int, which: int) -> Tensor:
            codes, scales = layers[layer][expert][which]
            rows, columns = _shapes(setting)[which]
            out: Tensor = module.apply_gptq_marlin_linear(
                input=x,
                weight=codes,
                weight_scale=scales,
                weight_zp=nothing,
                g_idx=nothing,
                g_idx_sort_indices=nothing,
                workspace=workspace,
                wtype=types.scalar_types.uint4b8,
                output_size_per_partition=rows,
                input_size_per_partition=columns,
                is_k_full=True,
            )
            return out

        return multiply

    version = importlib.import_module("gptqmodel").__version__
    yield from _by_expert(setting, f"gptqmodel {version} marlin", 4.125, matmul)


def gather(setting: Setting) -> Iterator[dict[str, object]]:
    """A compiled gather and matrix-vector product as in gpt-fast, in int8 and bf16."""
    for name, bits, dtype in (("int8", 8.0, torch.int8), ("bf16", 16.0, torch.bfloat16)):
        layers, experts = [], setting.widths.config.num_local_experts
        for _ in range(setting.widths.turns):
            stacks = []
            for shape in _shapes(setting):
                stack = torch.empty(experts, *shape, dtype=dtype, device=setting.device)
                stacks.append(stack.random_(-127, 127) if bits == 8 else stack.normal_(0, 0.02))
            layers.append(stacks)

        def block(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
            hidden = torch.einsum("td,tkfd->tkf", x, up[ids].to(x.dtype))
            gate, other = hidden.chunk(2, -1)
            y = torch.einsum("tkf,tkdf->tkd", F.silu(gate) * other, down[ids].to(x.dtype))
            return torch.einsum("tkd,tk->td", y, weights)

        compiled = block if setting.is_rehearsal else torch.compile(block, dynamic=False)
        for tokens in tokens_of(setting, GATHERED_TOKENS):
            x, routes = random_inputs(setting, tokens), random_routes(setting, tokens)
            weights = routes.weights.to(x.dtype)
            calls = [partial(compiled, x, routes.ids, weights, up, down) for up, down in layers]
            yield moe_result(setting, f"torch.compile gather {name}", bits, tokens, routes, calls)
        del layers


def _shapes(setting: Setting) -> tuple[tuple[int, int], tuple[int, int]]:
    """[N, K] of an expert's two matrices: w1 with w3, and w2."""
    config = setting.widths.config
    hidden, width = config.hidden_size, config.intermediate_size
    return (2 * width, hidden), (hidden, width)


def _each_matrix(setting: Setting, matrix: Callable[[int, int], T]) -> list[list[list[T]]]:
    """A matrix of each shape, of each expert, for each turn."""
    return [
        [
            [matrix(*shape) for shape in _shapes(setting)]
            for _ in range(setting.widths.config.num_local_experts)
        ]
        for _ in range(setting.widths.turns)
    ]


def _nf4(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N * K / 2] and absmax float32 [N, K / 64]."""
    codes = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, device=device)
    return codes, torch.full((rows, columns // 64), 2.4 / columns**0.5, device=device)


def _sorted_pairs(setting: Setting, routes: Routes) -> tuple[Tensor, Tensor, list[int], Tensor]:
    """Pairs sorted by expert: tokens [P], weights [P, 1], pairs of each expert, and the experts."""
    flat = routes.ids.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=setting.widths.config.num_local_experts).tolist()
    sizes = [count for count in counts if count]
    present = [expert for expert, count in enumerate(counts) if count]
    ids = torch.tensor(present, dtype=torch.int32, device=flat.device)
    return order // routes.ids.shape[1], routes.weights.reshape(-1, 1)[order], sizes, ids


def _by_expert(
    setting: Setting, name: str, bits: float, matmul: Callable[[int], Matmul]
) -> Iterator[dict[str, object]]:
    """A block of two products an expert, for a kernel that knows one matrix at a time."""
    for tokens in tokens_of(setting, TOKENS):
        x, routes = random_inputs(setting, tokens), random_routes(setting, tokens)
        token, weights, sizes, experts = _sorted_pairs(setting, routes)
        present = experts.tolist()
        parts = list(
            zip(
                present,
                *(t.split_with_sizes(sizes) for t in (token, weights.to(x.dtype))),
                strict=True,
            )
        )

        def call(layer: int, x: Tensor = x, parts: list[Any] = parts) -> Callable[[], object]:
            multiply = matmul(layer)

            def block() -> Tensor:
                out = torch.zeros_like(x)
                for expert, rows, weights_of in parts:
                    gate, up = multiply(x[rows], expert, 0).chunk(2, -1)
                    y = multiply(F.silu(gate) * up, expert, 1)
                    out.index_add_(0, rows, y * weights_of)
                return out

            return block

        yield moe_result(
            setting,
            name,
            bits,
            tokens,
            routes,
            [call(layer) for layer in range(setting.widths.turns)],
        )
