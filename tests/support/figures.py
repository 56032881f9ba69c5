"""Write the tables of figures in README.md and docs/ from records, baselines and the planner.

    python -m tests.support.figures

Each table stands between two marks that name it. Nothing between them is written by hand;
tests/test_docs.py keeps it in step.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qmix.commands import planner
from qmix.config import MixtralConfig
from qmix.errors import ResourceError
from qmix.evals import aot_record, layouts, markdown, prediction, speed
from qmix.kernels.gpu.grid import balance, grid_for
from qmix.kv_format import KVFormat
from qmix.weights.packed.tile_format import TileFormat
from tests.support import layout_tables
from tests.support.house import ROOT

RECORDS = ROOT / "evals" / "records"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_MARKS = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->\n)", re.DOTALL)
_GIB = 2**30
_ACCURACY = "2026-11-30-cpu-accuracy"
_BUDGETS = "2026-11-30-cpu-budgets"
# Matrices of the 8x7B that a token reads, [N, K], and how many of them.
_MATRICES = {
    "q, k and v": ((6144, 4096), 1),
    "o": ((4096, 4096), 1),
    "w1 and w3": ((28672, 4096), 2),
    "w2": ((4096, 14336), 2),
}


def _record(name: str) -> Any:
    return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))


def summary() -> str:
    """The README's five rows."""
    accuracy = _record(_ACCURACY)
    scores = {each["name"]: each for each in accuracy["scores"]}
    nf4, gptq = scores["nf4"], scores["gptq-g128"]
    within = _record("2026-11-23-cpu-offload-8gib")
    layer, layer_avx2 = _layers(*_VNNI), _layers(*_AVX2)
    rows = [
        (
            "memory, all on one GPU",
            f"{_planned('A100-40', 4096)} with 4k of context; 24 GiB in {_most_bits('4090')} bits; by "
            "arithmetic",
            "[memory](docs/memory-and-offload.md)",
        ),
        (
            "memory, less than the model",
            f"{within['peak_host_bytes'] / _GIB:.2f} GiB of host memory, no GPU: "
            f"{within['tokens_per_s']:.1f} tok/s on 2 cores, random weights",
            "[offload](docs/memory-and-offload.md#less-memory-than-the-model)",
        ),
        (
            "accuracy, tiny Mixtral",
            f"perplexity {accuracy['text']['bf16_perplexity']:.2f}; NF4 {nf4['perplexity']:.2f}, "
            f"GPTQ {gptq['perplexity']:.2f}; KL {nf4['kl_mean']:.4f} and {gptq['kl_mean']:.4f}, "
            f"{gptq['ratio']:.2f} of gptqmodel's best",
            "[accuracy](docs/accuracy.md)",
        ),
        ("speed on a GPU", _gpu(), "[speed](docs/speed.md)"),
        (
            "speed on 2 CPU cores, a layer",
            f"of llama.cpp's time at 1 token, with VNNI {_range(layer, 1)}, on AVX2 "
            f"{_range(layer_avx2, 1)}; at 512, {_range(layer, 512)} and {_range(layer_avx2, 512)}",
            "[speed](docs/speed.md#on-a-cpu)",
        ),
    ]
    return markdown.table(("", "qmix", "how it was measured"), rows)


def _gpu() -> str:
    return "-" if speed.speed_table() == speed.NOTHING else "see the table"


def guard() -> str:
    """The tiny model against its baselines."""
    figures = _baselines()
    base = figures["bf16_perplexity"]
    rows = [("bf16", f"{base:.4f}", "-", "-", "-")]
    for name, label in (("nf4", "NF4"), ("gptq", "GPTQ")):
        rows.append(
            (
                label,
                f"{base * figures[f'{name}_ratio']:.4f}",
                f"{figures[f'{name}_kl_mean']:.5f}",
                f"{figures[f'{name}_kl_p99']:.4f}",
                f"{100 * figures[f'{name}_top1_agreement']:.2f} %",
            )
        )
    return markdown.table(("", "perplexity", "mean KL", "p99 KL", "top-1 agreement"), rows)


def _baselines() -> Mapping[str, float]:
    found: Mapping[str, float] = json.loads((ROOT / "evals" / "baselines.json").read_text())[
        "figures"
    ]
    return found


def rivals() -> str:
    """Every method beside gptqmodel's, as the record has it."""
    return "\n".join(_record(_ACCURACY)["table"]) + "\n"


def attention() -> str:
    """Attention alone on a CPU, by prompt length."""
    found = {
        (one["prompt"], one["attention"]): one
        for one in _record("2026-11-22-cpu-attention")["report"]["measurements"]
        if one["window"] is None and one["best"] is not None
    }
    rows = []
    for prompt in sorted({prompt for prompt, _ in found}):
        eager, sdpa = found[prompt, "eager"], found[prompt, "sdpa"]
        rows.append(
            (
                str(prompt),
                f"{1e3 * eager['best']:.0f} ms",
                f"{1e3 * sdpa['best']:.0f} ms",
                f"{sdpa['against_eager']:.1f}",
                f"{eager['peak_bytes'] / 2**20:.0f} MiB",
                f"{sdpa['peak_bytes'] / 2**20:.0f} MiB",
            )
        )
    header = ("prompt", "eager", "sdpa", "times as fast", "memory, eager", "memory, sdpa")
    return markdown.table(header, rows)


# Records of whole layers on a CPU, by instruction set, and what stands beside what in them.
_OURS = tuple(product(("nf4 nested", "int4 g128"), ("Q4_0", "Q4_K")))
_SAME_FILES = tuple(product(("gguf",), ("Q4_0", "Q4_K_M", "IQ4_XS")))
_ZEN4 = "2026-11-23-epyc-cpu"  # an earlier state of the kernels
_VNNI, _AVX2 = ("2026-11-29-xeon-vnni", _OURS), ("2026-11-29-xeon-avx2", _OURS)
_NAMES = {
    "nf4": "NF4",
    "nf4 nested": "NF4 nested",
    "int4 g128": "Int4 g128",
}
_SAME_FILE = "the same file"


def _measured(record: str) -> Mapping[tuple[str, str, int], Any]:
    return {
        (one["part"], one["way"], one["tokens"]): one for one in _record(record)["measurements"]
    }


def _layers(record: str, pairs: Sequence[tuple[str, str]]) -> Mapping[int, list[float]]:
    """Median quotients of a layer's time, qmix over llama.cpp, by tokens."""
    found = _measured(record)
    return {
        count: [
            found["layer", f"qmix {way} (beside {peer})", count]["of_peer"][0]
            for way, peer in pairs
        ]
        for count in (1, 32, 512)
    }


def _range(quotients: Mapping[int, list[float]], count: int) -> str:
    return f"{min(quotients[count]):.2f} to {max(quotients[count]):.2f}"


def layers() -> str:
    """A whole layer on a CPU with VNNI beside llama.cpp's."""
    return _layer_table(*_VNNI)


def layers_avx2() -> str:
    """The same held to AVX2, both programs."""
    record, pairs = _AVX2
    return _layer_table(record, (*pairs, *_SAME_FILES))


def _layer_table(record: str, pairs: Sequence[tuple[str, str]]) -> str:
    found = _measured(record)
    rows = []
    for way, peer in pairs:
        cells = [f"{_NAMES.get(way, _SAME_FILE)} / {peer}"]
        for count in (1, 32, 512):
            ours = found["layer", f"qmix {way} (beside {peer})", count]
            theirs = found["layer", f"llama.cpp {peer} (beside {way})", count]
            cells.append(f"{_ms(ours['median'])} / {_ms(theirs['median'])}")
            if count == 1:
                cells.append(f"{_ms(ours['best'])} / {_ms(theirs['best'])}")
                cells.append(f"{100 * ours['of_bound']:.0f} %")
            middle, low, high = ours["of_peer"]
            cells.append(f"**{middle:.2f}** ({low:.2f} to {high:.2f})")
        rows.append(cells)
    header = (
        *("qmix / llama.cpp, ms", "1 token, median", "best", "qmix of a plain read", "quotient"),
        *("32, median", "quotient", "512, median", "quotient"),
    )
    return markdown.table(header, rows)


def experts() -> str:
    """The routed experts of one layer on a CPU, beside other 4-bit matmuls."""
    found = _measured(_ZEN4)
    rows = []
    for label, way in (
        *((f"qmix {name}", f"qmix {way}") for way, name in _NAMES.items()),
        ("torch's int4 kernel, g128", "torch int4pack, int4 g128"),
        ("torch's int4 kernel, g32", "torch int4pack, int4 g32"),
        ("bitsandbytes, NF4", "bitsandbytes, nf4"),
        ("torch, dequantize and multiply, NF4", "torch dequantize, nf4"),
    ):
        one, few, many = (found["experts", way, count] for count in (1, 32, 512))
        rows.append(
            (
                label,
                f"{one['bits']:.3f}",
                f"{_ms(one['best'])} ({_ms(one['median'])})",
                f"{100 * one['of_bound']:.0f} %",
                _ms(few["median"]),
                _ms(many["median"]),
            )
        )
    header = ("experts of a layer, top-2, ms", "bits", "1 token, best (median)")
    return markdown.table((*header, "of a plain read", "32, median", "512, median"), rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def offload() -> str:
    """The full shape in less memory than it has bytes."""
    rows = []
    for size in (8, 4):
        one = _record(f"2026-11-23-cpu-offload-{size}gib")
        rows.append(
            (
                f"{size} GiB",
                f"{one['peak_host_bytes'] / _GIB:.2f} GiB",
                f"{one['first_token_s']:.1f} s",
                f"{one['tokens_per_s']:.1f} tok/s",
                f"[record](../evals/records/2026-11-23-cpu-offload-{size}gib.json)",
            )
        )
    return markdown.table(("budget", "peak", "first token", "then", ""), rows)


def cards() -> str:
    """What fits in which device memory, and the bound."""
    rows = []
    for card in ("H100", "A100-40", "3090", "20GiB", "16GiB", "12GiB", "8GiB"):
        short, long = _plan(card, 4096), _plan(card, 32768)
        coded = _plan(card, 32768, "int8")
        assert short is not None
        label = f"{short.estimate.plan.vram / _GIB:.0f} GiB"
        if not card.endswith("GiB"):
            label += f" ({card})"
        rows.append((label, *map(_experts, (short, long, coded)), _bound(short)))
    wide = ("experts on the GPU at 4k", "at 32k", "at 32k, `--kv int8`")
    header = ("device memory", *wide, "bound at 4k, tok/s")
    return markdown.table(header, rows)


def fewer_bits() -> str:
    """What fits of `--method auto`, and what was measured of its accuracy."""
    scores = {each["name"]: each["kl_mean"] for each in _record(_BUDGETS)["scores"]}
    rows = []
    for bits in (4.25, 4, 3.5, 3, 2.5):
        large, small = (_plan(card, 4096, bits=bits) for card in ("4090", "16GiB"))
        assert large is not None
        assert small is not None
        plan = large.estimate.plan
        context = f"{plan.resident_context}" if plan.resident else "-"
        kl = f"{scores[f'auto-{bits}']:.4f}"
        rows.append((f"{bits}", kl, _experts(large), context, _bound(large), _experts(small)))
    header = ("bits", "KL, tiny model", "experts on a 4090 at 4k", "longest context with all")
    return markdown.table((*header, "bound at 4k, tok/s", "experts on 16 GiB at 4k"), rows)


def _plan(
    card: str, context: int, kv: KVFormat = "16", bits: float | None = None
) -> planner.PlanAnswer | None:
    """For a card by its name, or for one of a size; in NF4, or in so many bits."""
    method = {} if bits is None else {"method": "auto", "bits": bits}
    where = {"vram": card} if card.endswith("GiB") else {"card": card}
    with TemporaryDirectory() as scratch:
        MixtralConfig(max_position_embeddings=32768).save_pretrained(Path(scratch))
        try:
            return planner.answer(
                planner.PlanRequest(
                    source=Path(scratch), ram="64GiB", context=context, kv=kv, **where, **method
                )
            )
        except ResourceError:
            return None


def _planned(card: str, context: int) -> str:
    answer = _plan(card, context)
    assert answer is not None
    return f"{answer.estimate.plan.device_memory.total / _GIB:.1f} GiB"


def _most_bits(card: str) -> str:
    answer = _plan(card, 4096)
    assert answer is not None
    changes = (one.change for one in answer.estimate.suggestions)
    return next(change for change in changes if "--method auto" in change).split()[-1]


def _experts(answer: planner.PlanAnswer | None) -> str:
    if answer is None:
        return "-"
    plan = answer.estimate.plan
    if plan.resident:
        return f"all ({plan.device_memory.total / _GIB:.1f} GiB)"
    return f"{plan.slots} of {plan.experts}"


def _bound(answer: planner.PlanAnswer) -> str:
    if answer.estimate.plan.resident:
        return f"{answer.estimate.speeds[0].bound:.0f}"
    return ", ".join(
        f"{one.bound:.1f} {'on the CPU' if one.path == 'cpu' else 'over PCIe'}"
        for one in answer.estimate.speeds
    )


def true_width() -> str:
    """Experts of true width in every layout."""
    found = _record("2026-11-29-xeon-layouts")["measurements"]
    return layouts.table([layouts.LayoutTiming(**one) for one in found])


def gpu_kernels() -> str:
    """What the loops of the GPU kernels cost, compiled ahead of time."""
    return aot_record.table()


def gpu_grids() -> str:
    """How evenly one token's products occupy a GPU."""
    counts = (108, 128, 132, 148)
    rows = []
    for kind, label in ((TileFormat("nf4", 64), "NF4"), (TileFormat("int4", 128), "Int4")):
        for name, (shape, groups) in _MATRICES.items():
            cells = []
            for count in counts:
                grid = grid_for(shape, kind, groups=groups, columns=8, multiprocessors=count)
                even = balance(grid.rows * groups, grid.splits, shape[1] // kind.inputs, count)
                cells.append(f"{even:.2f} ({grid.config.warps}, {grid.splits})")
            rows.append((f"{label}, {name}", *cells))
    header = ("balance (warps a block, splits of K)", *(f"{count}" for count in counts))
    return markdown.table(header, rows)


TABLES: Mapping[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        *(
            summary,
            guard,
            rivals,
            attention,
            layers,
            layers_avx2,
            experts,
            true_width,
            offload,
            fewer_bits,
            cards,
            gpu_kernels,
            gpu_grids,
        ),
        *(prediction.launch_table, prediction.speed_table),
        *(layout_tables.kinds, layout_tables.layouts_in_short, layout_tables.unread),
    )
}


def written(text: str) -> str:
    """A page with its tables as they are now."""
    return _MARKS.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main() -> None:
    for page in PAGES:
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
