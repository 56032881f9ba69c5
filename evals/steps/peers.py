"""Step `peers`: the same experts by other projects' kernels, if their packages are installed.

Each peer gets the routing as a host would know it, sorted and with fixed experts, so that it can be
recorded in a graph: the best case for it. The codes are random and of the right shapes; none of the
peers' code is here. Shape letters: P pairs of a token and an expert, N outputs, K inputs.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.evals.steps.moe_block import (
    EXPERTS,
    EXPERTS_PER_TOKEN,
    HIDDEN,
    LAYERS,
    WIDTH,
    moe_result,
    random_inputs,
    random_routes,
)
from qmix.kernels import Routes
from qmix.weights.table import NF4_VALUES

TOKENS = (1, 2, 4, 8, 16, 64)
GATHERED_TOKENS = (1, 2, 4)  # a gather copies the experts of every token
_SHAPES = ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH))

# (x, expert, matrix) -> x through one of the expert's two matrices.
Matmul = Callable[[Tensor, int, int], Tensor]


def results(device: torch.device) -> Iterator[dict[str, object]]:
    """One result for each peer and number of tokens; a peer that is missing or fails is named."""
    peers: dict[str, Callable[[torch.device], Iterator[dict[str, object]]]] = {
        "bitsandbytes": bitsandbytes,
        "grouped-nf4-gemm": grouped_nf4_gemm,
        "torch int4pack": int4pack,
        "torch.compile gather": gather,
    }
    for name, peer in peers.items():
        try:
            yield from peer(device)
        except ImportError as error:
            yield {"kernel": name, "skipped": f"not installed: {error}"}
        except Exception as error:  # noqa: BLE001 - a peer's failure is a result, not ours
            yield {"kernel": name, "failed": f"{type(error).__name__}: {error}"[:400]}
        torch.cuda.empty_cache()


def bitsandbytes(device: torch.device) -> Iterator[dict[str, object]]:
    """NF4 with float32 absmax, an expert at a time."""
    functional: Any = importlib.import_module("bitsandbytes.functional")
    package: Any = importlib.import_module("bitsandbytes")
    table = torch.tensor(NF4_VALUES, device=device)

    def matrix(rows: int, columns: int) -> tuple[Tensor, object]:
        codes, absmax = _nf4(rows, columns, device)
        state = functional.QuantState(
            absmax=absmax.flatten(),
            shape=torch.Size((rows, columns)),
            code=table,
            blocksize=64,
            quant_type="nf4",
            dtype=torch.bfloat16,
        )
        return codes.view(-1, 1), state

    layers = [
        [[matrix(*shape) for shape in _SHAPES] for _ in range(EXPERTS)] for _ in range(LAYERS)
    ]

    def matmul(layer: int) -> Matmul:
        def multiply(x: Tensor, expert: int, which: int) -> Tensor:
            codes, state = layers[layer][expert][which]
            out: Tensor = package.matmul_4bit(x, codes.t(), quant_state=state)
            return out

        return multiply

    name = f"bitsandbytes {package.__version__} nf4"
    yield from _by_expert(name, 4.5, device, matmul)


def grouped_nf4_gemm(device: torch.device) -> Iterator[dict[str, object]]:
    """NF4 with float32 absmax, all experts in one launch: its default and its decode kernel."""
    grouped: Any = importlib.import_module("nf4_grouped")
    layers = []
    for _ in range(LAYERS):
        stacks = []
        for rows, columns in _SHAPES:
            parts = [_nf4(rows, columns, device) for _ in range(EXPERTS)]
            codes = torch.stack([codes.view(rows, columns // 2) for codes, _ in parts])
            stacks.append((codes, torch.stack([absmax for _, absmax in parts])))
        layers.append(stacks)
    for setting in ("", "1"):
        if setting:
            os.environ["GNF4_GEMV_BW"] = setting
        for tokens in TOKENS:
            x, routes = random_inputs(tokens, device), random_routes(tokens, device)
            token, weights, sizes, experts = _sorted_pairs(routes)

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

            name = "grouped-nf4-gemm" + (f" GNF4_GEMV_BW={setting}" if setting else "")
            yield moe_result(name, 4.5, tokens, routes, [call(layer) for layer in range(LAYERS)])
    os.environ.pop("GNF4_GEMV_BW", None)


def int4pack(device: torch.device) -> Iterator[dict[str, object]]:
    """torch's own int4 matmul (tinygemm) in groups of 128, an expert at a time."""

    def matrix(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device)
        packed = torch._convert_weight_to_int4pack(codes, 8)
        scales = torch.full((columns // 128, rows, 2), 0.003, device=device).bfloat16()
        return packed, scales

    layers = [
        [[matrix(*shape) for shape in _SHAPES] for _ in range(EXPERTS)] for _ in range(LAYERS)
    ]

    def matmul(layer: int) -> Matmul:
        def multiply(x: Tensor, expert: int, which: int) -> Tensor:
            packed, scales = layers[layer][expert][which]
            return torch._weight_int4pack_mm(x, packed, 128, scales)

        return multiply

    yield from _by_expert("torch._weight_int4pack_mm", 4.25, device, matmul)


def gather(device: torch.device) -> Iterator[dict[str, object]]:
    """A compiled gather and matrix-vector product as in gpt-fast, in int8 and bf16."""
    for name, bits, dtype in (("int8", 8.0, torch.int8), ("bf16", 16.0, torch.bfloat16)):
        layers = []
        for _ in range(LAYERS):
            stacks = []
            for shape in _SHAPES:
                stack = torch.empty(EXPERTS, *shape, dtype=dtype, device=device)
                stacks.append(stack.random_(-127, 127) if bits == 8 else stack.normal_(0, 0.02))
            layers.append(stacks)

        def block(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
            hidden = torch.einsum("td,tkfd->tkf", x, up[ids].to(x.dtype))
            gate, other = hidden.chunk(2, -1)
            y = torch.einsum("tkf,tkdf->tkd", F.silu(gate) * other, down[ids].to(x.dtype))
            return torch.einsum("tkd,tk->td", y, weights)

        compiled = torch.compile(block, dynamic=False)
        for tokens in GATHERED_TOKENS:
            x, routes = random_inputs(tokens, device), random_routes(tokens, device)
            weights = routes.weights.bfloat16()
            calls = [partial(compiled, x, routes.ids, weights, up, down) for up, down in layers]
            yield moe_result(f"torch.compile gather {name}", bits, tokens, routes, calls)
        del layers


def _nf4(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N * K / 2] and absmax float32 [N, K / 64]."""
    codes = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, device=device)
    return codes, torch.full((rows, columns // 64), 2.4 / columns**0.5, device=device)


def _sorted_pairs(routes: Routes) -> tuple[Tensor, Tensor, list[int], Tensor]:
    """Pairs sorted by expert: tokens [P], weights [P, 1], pairs of each expert, and the experts."""
    flat = routes.ids.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=EXPERTS).tolist()
    sizes = [count for count in counts if count]
    present = [expert for expert, count in enumerate(counts) if count]
    ids = torch.tensor(present, dtype=torch.int32, device=flat.device)
    return order // EXPERTS_PER_TOKEN, routes.weights.reshape(-1, 1)[order], sizes, ids


def _by_expert(
    name: str, bits: float, device: torch.device, matmul: Callable[[int], Matmul]
) -> Iterator[dict[str, object]]:
    """A block of two products an expert, for a kernel that knows one matrix at a time."""
    for tokens in TOKENS:
        x, routes = random_inputs(tokens, device), random_routes(tokens, device)
        token, weights, sizes, experts = _sorted_pairs(routes)
        present = experts.tolist()
        parts = list(
            zip(
                present,
                *(t.split_with_sizes(sizes) for t in (token, weights.bfloat16())),
                strict=True,
            )
        )

        def call(layer: int, x: Tensor = x, parts: list[Any] = parts) -> Callable[[], object]:
            multiply = matmul(layer)

            def block() -> Tensor:
                out = torch.zeros_like(x)
                for expert, tokens_of, weights_of in parts:
                    gate, up = multiply(x[tokens_of], expert, 0).chunk(2, -1)
                    y = multiply(F.silu(gate) * up, expert, 1)
                    out.index_add_(0, tokens_of, y * weights_of)
                return out

            return block

        yield moe_result(name, bits, tokens, routes, [call(layer) for layer in range(LAYERS)])
