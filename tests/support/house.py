"""The house: which room stands on which floor, who imports whom, who owns a package.

    python -m tests.support.house           # rooms, floors, arrows, circles, upward imports
    python -m tests.support.house --write   # the same table into qmix/DESIGN.md

Reads source files and imports none of them. tests/test_floors.py keeps what is declared here true.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DESIGN = ROOT / "qmix" / "DESIGN.md"
BEGIN, END = "<!-- floors: python -m tests.support.house --write -->", "<!-- end of floors -->"

# From the ground up. A room is a folder with all below it, or a file that stands alone.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("qmix.errors", "qmix.printable", "qmix.quantities", "qmix.work_meter"),
    (
        "qmix.instruction_sets",
        "qmix.weights",
        "qmix.strict_json",
        "qmix.files",
        "qmix.gguf",
        "qmix.hub",
        "qmix.config_rules",
        "qmix.kv_format",
        "qmix.processes",
    ),
    ("qmix.text", "qmix.config", "qmix.kernels"),
    ("qmix.formats",),
    ("qmix.planning", "qmix.experts", "qmix.tuning", "qmix.pages"),
    ("qmix.nn",),
    ("qmix.generation",),
    ("qmix.models",),
    ("qmix.hf", "qmix"),
    ("qmix.quantize", "qmix.evals", "qmix.serving"),
    ("qmix.serving.http",),
    ("qmix.commands",),
    ("qmix.cli",),
)
# Rooms of one floor that may import another of the same floor.
SIBLINGS = {
    ("qmix.errors", "qmix.printable"),
    ("qmix.strict_json", "qmix.files"),
    ("qmix.gguf", "qmix.files"),
    ("qmix.hub", "qmix.files"),
    ("qmix.hub", "qmix.strict_json"),
    ("qmix.hub", "qmix.gguf"),
    ("qmix.evals", "qmix.quantize"),
    ("qmix.evals", "qmix.serving"),
    ("qmix.hf", "qmix"),
}

# Which files may import which third-party package; torch may be imported by all but TORCHLESS.
OWNERS: Mapping[str, set[str]] = {
    "huggingface_hub": {"qmix.hub.remote", "qmix.hub.cache"},
    "sentencepiece": {
        *("qmix.text.sentencepiece_backend", "qmix.evals.training.train_tokenizer"),
    },
    "jinja2": {"qmix.text.template_worker", "qmix.pages.page"},
    "tokenizers": {
        *("qmix.text.backend", "qmix.text.tokenizers_backend", "qmix.text.sentencepiece_backend"),
        *("qmix.text.tokenizer_config", "qmix.text.token_table"),
    },
    "rich": {
        *("qmix.commands.terminal", "qmix.commands.repl", "qmix.commands.progress"),
        *("qmix.commands.line_editing.choice", "qmix.commands.markdown.screen"),
    },
    "markdown_it": {"qmix.commands.markdown.inline", "qmix.commands.markdown.table"},
    "pygments": {"qmix.commands.markdown.code"},
    "wcwidth": {"qmix.commands.markdown.cells"},
    "prompt_toolkit": {
        "qmix.commands.line_editing.completion",
        "qmix.commands.line_editing.editor",
        "qmix.commands.line_editing.history",
        "qmix.commands.line_editing.interrupt_key",
    },
    "typer": {
        *("qmix.cli", "qmix.commands.options", "qmix.commands.quantize", "qmix.commands.files"),
        *("qmix.commands.bench", "qmix.commands.evaluate", "qmix.commands.generate"),
        *("qmix.commands.eval_sharing", "qmix.commands.processes", "qmix.commands.json_log"),
        "qmix.commands.plan",
        *("qmix.commands.serve", "qmix.commands.serve_ray"),
        "qmix.commands.batch",
        *(
            "qmix.commands.doctor",
            "qmix.commands.trace",
            "qmix.commands.tune",
            "qmix.commands.help_page",
        ),
        *("qmix.commands.hub", "qmix.commands.chat.command", "qmix.commands.compare"),
    },
    "starlette": {
        *("qmix.serving.http.app", "qmix.serving.http.body", "qmix.serving.http.errors"),
        *("qmix.serving.http.event_stream", "qmix.serving.http.flight", "qmix.serving.http.guard"),
        *("qmix.serving.http.server", "qmix.serving.http.service"),
        "qmix.serving.http.cluster.replica",
    },
    "httpx": {"qmix.commands.chat.server"},
    "lm_eval": {
        *("qmix.evals.harness.__main__", "qmix.evals.harness.language_model"),
        "qmix.evals.harness.task_run",
    },
    "ray": {
        *("qmix.serving.batch.ray_workers", "qmix.serving.ray_cluster"),
        *("qmix.serving.http.cluster.application", "qmix.serving.http.cluster.foreground"),
        "qmix.commands.ray_config",  # for type checking
    },
    "opentelemetry": {"qmix.serving.http.app", "qmix.serving.http.tracing"},
    "accelerate": {"qmix.processes.group"},
    "llguidance": {"qmix.serving.grammar", "qmix.serving.grammar_worker"},
    "prometheus_client": {"qmix.serving.http.metrics"},
    "uvicorn": {"qmix.serving.http.connection", "qmix.serving.http.server"},
    "pynvml": {"qmix.commands.chat.energy"},
    "flash_attn": {"qmix.kernels.flash"},
    "transformers": {"qmix.hf"},
    "bitsandbytes": {"qmix.kernels.bnb"},
    "matplotlib": {"qmix.pages.svg", "qmix.pages.charts"},
    "triton": {
        "qmix.kernels.gpu.dependent_triton",
        "qmix.kernels.gpu.fused_triton",
        "qmix.kernels.gpu.arrivals_triton",
        "qmix.kernels.gpu.compile_ahead",
        "qmix.kernels.gpu.moe_triton",
        "qmix.kernels.gpu.panel_triton",
        "qmix.kernels.gpu.slices_triton",
        "qmix.kernels.gpu.tiles_triton",
        "qmix.kernels.gpu.attention_triton",
        "qmix.kernels.gpu.pointwise_triton",
        "qmix.quantize.rounding.gptq_triton",
        "qmix.evals.timing.machine_code",
        "qmix.kernels.gpu.card",
        "qmix.evals.acceptance.interpreted_codes",
    },
    "numpy": {
        "qmix.evals.sharing.score_folder",
        "qmix.weights.table",
        "qmix.weights.affine",
        "qmix.weights.float8",
        "qmix.weights.slabs",
        "qmix.formats.layouts.gguf",
        "qmix.formats.layouts.gguf_blocks",
        "qmix.formats.layouts.gguf_fields",
        "qmix.formats.layouts.gguf_grids",
        "qmix.formats.layouts.gguf_iq",
        "qmix.formats.layouts.hqq",
        "qmix.weights.nf4",
        "qmix.quantize.calibrated.activations",
        "qmix.evals.timing.llama_peer",
        "qmix.evals.quality.llama_quantize",
        "qmix.evals.quality.llama_quantizers",
        "qmix.evals.acceptance.interpreted_codes",
    },
}
# Rooms and files without torch: `qmix plan`, `inspect` and every usage error answer without it.
TORCHLESS = (
    *(
        "qmix.errors",
        "qmix.quantities",
        "qmix.work_meter",
        "qmix.files",
        "qmix.strict_json",
        "qmix.config",
        "qmix.planning",
        "qmix.instruction_sets",
    ),
    "qmix.hub",
    "qmix.config_rules",
    "qmix.kv_format",
    "qmix.gguf",
    "qmix.pages",
    *("qmix.weights.scheme", "qmix.weights.packed.tile_format", "qmix.weights.packed.codes"),
    *("qmix.weights.packed.packed_shapes", "qmix.weights.blob"),
    *("qmix.text.chat_template", "qmix.printable", "qmix.formats.metadata"),
    *("qmix.formats.compatibility", "qmix.formats.names", "qmix.formats.layouts.tensor_names"),
    "qmix.formats.readers",
    "qmix.formats.makers",
    *("qmix.formats.gguf", "qmix.formats.layouts.gguf_schemes"),
    *("qmix.formats.files.safetensors_header", "qmix.formats.files.shard_index"),
    *(
        "qmix.formats.files.output_dir",
        "qmix.formats.files.manifest",
        "qmix.formats.files.companions",
    ),
    *("qmix.formats.mistral.params", "qmix.commands.checkpoint.inspect"),
    *("qmix.formats.mistral.detect", "qmix.commands.planner", "qmix.commands.plan_text"),
    "qmix.commands.plan_served",
    *("qmix.commands.plan_plot", "qmix.models.option_names"),
    *("qmix.commands.repl", "qmix.commands.session"),
    *("qmix.commands.chat.chat_model", "qmix.commands.chat.remote_model"),
    *("qmix.commands.chat.server", "qmix.commands.chat.commands"),
    *("qmix.commands.help_page", "qmix.commands.progress"),
)


@cache
def modules() -> Mapping[str, Path]:
    """Every module of the project by its name."""
    found = {"qmix.cli": ROOT / "cli.py"}
    for base, package in (("qmix", "qmix"), ("quantize", "qmix.quantize"), ("evals", "qmix.evals")):
        for path in (ROOT / base).rglob("*.py"):
            parts = path.relative_to(ROOT / base).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


@cache
def imported(name: str) -> frozenset[str]:
    """Every name that a module imports, within functions too, but not for type checking only."""
    names = set()
    tree = ast.parse(modules()[name].read_text())
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def imported_modules(name: str) -> Iterator[str]:
    """The project's modules that a module imports."""
    for other in imported(name):
        while other and other not in modules():
            other = other.rpartition(".")[0]
        if other.partition(".")[0] == "qmix" and other != name:
            yield other


def room(name: str) -> str:
    """The room in which a module lies."""
    if name == "qmix.__main__":  # `python -m qmix` is the command line
        return "qmix.cli"
    known = {room for floor in FLOORS for room in floor}
    while name not in known:
        name = name.rpartition(".")[0]
    return name


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(name) in rooms)


@dataclass(frozen=True)
class House:
    """Arrows lead from a room to those that it imports."""

    arrows: frozenset[tuple[str, str]]
    upward: tuple[str, ...]
    circles: tuple[str, ...]


def survey() -> House:
    """Look at all imports."""
    arrows, upward = set(), []
    files: dict[str, set[str]] = {}
    for name in modules():
        files[name] = set(imported_modules(name))
        for other in files[name]:
            here, there = room(name), room(other)
            if here == there:
                continue
            arrows.add((here, there))
            if floor(there) > floor(here) or (
                floor(there) == floor(here) and (here, there) not in SIBLINGS
            ):
                upward.append(f"{name} imports {other}")
    rooms: dict[str, set[str]] = {}
    for here, there in arrows:
        rooms.setdefault(here, set()).add(there)
    circles = [found for graph in (rooms, files) if (found := _circle(graph))]
    return House(frozenset(arrows), tuple(sorted(upward)), tuple(circles))


def _circle(graph: Mapping[str, set[str]]) -> str:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " > ".join(error.args[1])
    return ""


def table() -> str:
    """The floors as DESIGN.md shows them, the top one first."""
    lines = ["| floor | room | what it is for |", "|---|---|---|"]
    for number, rooms in reversed(list(enumerate(FLOORS))):
        for name in rooms:
            doc = ast.get_docstring(ast.parse(modules()[name].read_text())) or ""
            lines.append(f"| {number} | `{name}` | {doc.partition(chr(10))[0]} |")
    return "\n".join(lines)


def in_design(text: str) -> str:
    """DESIGN.md with the table as it is now."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    if "--write" in sys.argv:
        DESIGN.write_text(in_design(DESIGN.read_text()))
        return
    house = survey()
    rooms = [name for floor in FLOORS for name in floor]
    print(table())
    print(
        f"{len(rooms)} rooms on {len(FLOORS)} floors, {len(modules())} files, "
        f"{len(house.arrows)} arrows between rooms, {len(house.circles)} circles, "
        f"{len(house.upward)} upward imports"
    )
    for line in (*house.circles, *house.upward):
        print(line)


if __name__ == "__main__":
    main()
