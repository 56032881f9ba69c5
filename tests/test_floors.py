"""Imports go downward only: each module may import lower floors, or siblings of its own floor."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# qmix/DESIGN.md, "Floors". A package stands for all its modules unless one is named itself.
FLOORS = {
    "qmix": 0,
    "qmix.errors": 0,
    "qmix.strict_json": 0,
    "qmix.config": 0,
    "qmix.weights.scheme": 0,
    "qmix.planning.byte_sizes": 0,
    "qmix.weights.packed.tile_format": 0,
    "qmix.planning.gpus": 0,
    "qmix.text.tokenizer": 0,
    "qmix.text.sentencepiece_file": 0,
    "qmix.text.detokenizer": 0,
    "qmix.text.chat_template": 0,
    "qmix.weights.nf4": 1,
    "qmix.fp4": 1,
    "qmix.weights.integers": 1,
    "qmix.int4": 1,
    "qmix.int8": 1,
    "qmix.kernels": 2,
    "qmix.formats": 3,
    "qmix.nn.cache": 4,
    "qmix.nn.outputs": 4,
    "qmix.formats.compatibility": 4,
    "qmix.commands.checkpoint.inspect": 4,
    "qmix.planning.machine": 4,
    "qmix.planning.footprint": 4,
    "qmix.planning.budget": 4,
    "qmix.planning.roofline": 4,
    "qmix.planning.quantize_cost": 4,
    "qmix.planning.plan": 5,
    "qmix.planning.estimate": 5,
    "qmix.experts": 4,
    "qmix.nn.attention": 5,
    "qmix.nn.decoder_layer": 5,
    "qmix.nn.decoder": 5,
    "qmix.nn.losses": 5,
    "qmix.generation.padding": 5,
    "qmix.generation.stopping": 5,
    "qmix.generation.streamers": 5,
    "qmix.generation.logits_processors": 5,
    "qmix.generation.sampling": 6,
    "qmix.generation.config": 6,
    "qmix.generation.token_choice": 6,
    "qmix.generation.loop": 6,
    "qmix.models.pack": 6,
    "qmix.generation.cuda_graph": 6,
    "qmix.models.offload": 6,
    "qmix.models.load": 6,
    "qmix.models.pretrained": 7,
    "qmix.models.mixtral": 7,
    "qmix.models.classifier": 7,
    "qmix.models.causal_lm": 7,
    "qmix.models.auto": 7,
    "qmix.commands.session": 8,
    "qmix.commands.repl": 8,
    "qmix.commands.checkpoint.verify": 8,
    "qmix.hf": 8,
    "qmix.commands.checkpoint.export": 8,
    "qmix.quantize": 8,
    "qmix.evals": 9,
    "qmix.commands.doctor": 9,
    "qmix.commands.plan": 9,
    "qmix.commands.terminal": 9,
    "qmix.commands.trace": 10,
    "qmix.plan_commands": 10,
    "qmix.cli": 10,
}

# Which files may import which third-party package.
HOMES = {
    "sentencepiece": {"qmix.text.tokenizer", "qmix.evals.training.train_tokenizer"},
    "rich": {"qmix.commands.terminal", "qmix.commands.repl", "qmix.evals.quality.demo"},
    "typer": {"qmix.cli", "qmix.commands.trace", "qmix.plan_commands"},
    "flash_attn": {"qmix.kernels.flash"},
    "transformers": {"qmix.hf"},
    "matplotlib": {"qmix.evals.timing.attention_bench"},
    "triton": {
        "qmix.kernels.gpu.moe_triton",
        "qmix.kernels.gpu.attention_triton",
        "qmix.kernels.gpu.pointwise_triton",
        "qmix.evals.timing.machine_code",
    },
    "numpy": {
        "qmix.weights.nf4",
        "qmix.weights.integers",
        "qmix.int4",
        "qmix.int8",
        "qmix.quantize.rounding.nf4",
        "qmix.quantize.calibrated.activations",
        "qmix.evals.timing.llama_peer",
    },
}
TORCHLESS = {
    *(
        "qmix",
        "qmix.errors",
        "qmix.strict_json",
        "qmix.config",
        "qmix.weights.scheme",
        "qmix.text.chat_template",
    ),
    *(
        "qmix.planning.byte_sizes",
        "qmix.weights.packed.tile_format",
        "qmix.planning.gpus",
        "qmix.planning.machine",
        "qmix.planning.footprint",
    ),
    *(
        "qmix.planning.budget",
        "qmix.planning.roofline",
        "qmix.planning.quantize_cost",
        "qmix.planning.plan",
        "qmix.planning.estimate",
        "qmix.commands.plan",
    ),
    *(
        "qmix.formats.files.safetensors_header",
        "qmix.formats.layouts.tensor_names",
        "qmix.formats.metadata",
        "qmix.formats.mistral.detect",
    ),
}


def modules() -> dict[str, Path]:
    found = {}
    for base, package in (("qmix", "qmix"), ("quantize", "qmix.quantize"), ("evals", "qmix.evals")):
        for path in (ROOT / base).rglob("*.py"):
            parts = path.relative_to(ROOT / base).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    found["qmix.cli"] = ROOT / "cli.py"
    return found


MODULES = modules()


def imported(path: Path) -> set[str]:
    """Every module imported anywhere in the file, functions included, type checking excluded."""
    names = set()
    tree = ast.parse(path.read_text())
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
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor(name: str) -> int | None:
    while name:
        if name in FLOORS:
            return FLOORS[name]
        name = name.rpartition(".")[0]
    return None


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_downward_only(name):
    own = floor(name)
    assert own is not None, f"{name} has no floor"
    for other in imported(MODULES[name]):
        if other.startswith("qmix"):
            assert floor(other) <= own, f"{name} (floor {own}) imports {other}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_third_party_packages_stay_in_their_homes(name):
    for other in imported(MODULES[name]):
        package = other.partition(".")[0]
        if package in HOMES:
            assert name in HOMES[package], f"{name} imports {package}"
        elif package not in sys.stdlib_module_names:
            assert package in ("qmix", "torch", "pydoc_data"), f"{name} imports {package}"
    if name in TORCHLESS:
        assert not any(other.partition(".")[0] == "torch" for other in imported(MODULES[name]))


def test_every_file_fits_a_few_screens():
    long = {name: n for name, path in MODULES.items() if (n := path.read_text().count("\n")) > 600}
    assert not long, long


def test_importing_qmix_imports_no_torch():
    import subprocess

    code = "import sys, qmix, qmix.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
