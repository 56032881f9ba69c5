"""The wheel nests everything under `qmix` and carries neither weights nor notes."""

import subprocess
import sys
import zipfile

import pytest

from tests.support.models import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    api = pytest.importorskip("poetry.core.masonry.api")
    import os

    out = tmp_path_factory.mktemp("wheel")
    here = os.getcwd()
    os.chdir(ROOT)
    try:
        return out / api.build_wheel(str(out))
    finally:
        os.chdir(here)


def test_the_wheel_holds_the_modules_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert all(top == "qmix" or top.endswith(".dist-info") for top in tops), tops
    assert wheel.name.startswith("qmix_runtime-")
    inside = {name for name in names if name.startswith("qmix/")}
    for module in ("cli.py", "py.typed", "quantize/streaming.py", "evals/quality/perplexity.py", "evals/quality/demo.py",
                   "evals/baselines.json", "formats/layouts/bnb.py", "kernels/tiles.py", "kernels/cpu/csrc/kernels.cpp",
                   "kernels/cpu/csrc/matrix.h", "pages/page.html.jinja",
                   "serving/http/page/page.html", "serving/http/page/page.css", "serving/http/page/chat.js"):  # fmt: skip
        assert f"qmix/{module}" in inside, module
    assert not [n for n in inside if n.endswith((".safetensors", ".model", ".md"))]
    expected = {
        str(path.relative_to(ROOT)).replace("qmix/", "", 1)
        for base in ("qmix", "quantize", "evals")
        for path in (ROOT / base).rglob("*.py")
    }
    assert {f"qmix/{name}" for name in expected} <= inside


def test_the_unpacked_wheel_works_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import qmix, qmix.cli, qmix.quantize.streaming, qmix.evals.quality.perplexity;"
        "assert len(qmix.__path__) == 1; from qmix import MixtralForCausalLM, load, AutoTokenizer"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, check=True
    )
    demo = subprocess.run(
        [sys.executable, "-m", "qmix.cli", "demo"],
        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert demo.returncode == 3
    assert "clone the repository" in demo.stderr
