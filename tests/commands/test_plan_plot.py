"""A plan as bars: all bytes are drawn, whatever the machine."""

import pytest

from qmix.commands import plan_plot
from qmix.commands.planner import PlanRequest, answer
from qmix.config import MixtralConfig
from qmix.planning.byte_sizes import show
from tests.support.process import qmix


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    MixtralConfig(max_position_embeddings=32768).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "budgets",
    [
        {"card": "3090", "ram": "64G"},
        {"card": "H100", "ram": "64G"},
        {"card": "4090", "ram": "16G"},
        {"ram": "64G"},
        {"ram": "16G"},
    ],
)
def test_the_bars_hold_every_byte_under_a_name(config, budgets):
    found = answer(PlanRequest(source=config, **budgets))
    planned = found.estimate.plan
    picture = plan_plot._picture(found)
    axes = picture.figure.axes[0]
    assert "other" not in [text.get_text() for text in picture.figure.legends[0].get_texts()]
    ends = [0.0] * len(axes.get_yticks())
    for bar in axes.patches:
        row = round(bar.get_y() + bar.get_height() / 2)
        ends[row] = max(ends[row], bar.get_x() + bar.get_width())
    totals = [planned.host_memory.total, planned.disk * planned.expert_bytes]
    if planned.gpu:
        totals.insert(0, planned.device_memory.total)
    assert ends == pytest.approx([total / 2**30 for total in totals])
    for total in totals:
        assert show(total) in picture.alt


def test_the_command_draws_and_replaces_only_when_told(config, tmp_path):
    out = tmp_path / "plan.svg"
    arguments = ("plan", config, "--card", "3090", "--ram", "64G", "--plot", out)
    result = qmix(*arguments)
    assert result.returncode == 0, result.stderr
    assert str(out) in result.stderr.replace("\n", "")
    drawn = out.read_bytes()
    assert b"attention, router and norms" in drawn
    assert qmix(*arguments).returncode == 2
    assert qmix(*arguments, "--force").returncode == 0
    assert out.read_bytes() == drawn
