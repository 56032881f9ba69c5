"""What is said without lm_eval, and where lm_eval looks for the model."""

import ast
import importlib.util
import tomllib

import pytest

from qmix.errors import UnsupportedError
from qmix.evals.harness import extra
from tests.support.models import ROOT
from tests.support.process import qmix


@pytest.fixture
def bare(monkeypatch):
    """As if lm_eval were not installed."""
    there = importlib.util.find_spec
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name == "lm_eval" else there(name))


@pytest.mark.usefixtures("bare")
def test_without_lm_eval_the_extra_is_named(tiny):
    result = qmix("eval", tiny, "--tasks", "evals/tasks/qmix_choice.yaml")
    assert result.returncode == 3
    assert "needs lm_eval" in result.stderr
    assert "pip install 'qmix-runtime[lm-eval]'" in result.stderr


@pytest.mark.usefixtures("bare")
def test_its_command_line_names_the_extra_too():
    from qmix.evals.harness import __main__

    with pytest.raises(UnsupportedError, match="lm-eval"):
        __main__.main()


def test_the_entry_point_names_the_class():
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, _, name = document["project"]["entry-points"]["lm_eval.models"]["qmix"].partition(":")
    path = ROOT / module.removeprefix("qmix.").replace(".", "/")
    tree = ast.parse(path.with_suffix(".py").read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tasks", "x", "--data", "x"), "--data and --tasks"),
        (("--tasks", "x", "--ctx", "64"), "--ctx does not apply"),
        (("--data", "x", "--limit", "3"), "--limit needs --tasks"),
        (("--data", "x", "--batch-size", "3"), "--batch-size needs --tasks"),
        (("--tasks", "x", "--by-position"), "take no --by-position"),
    ],
)
def test_options_that_do_not_apply_to_tasks_are_named(tiny, options, said):
    result = qmix("eval", tiny, *options)
    assert result.returncode == 2
    assert said in result.stderr
