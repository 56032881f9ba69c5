"""A calibrated run does what it planned, whatever is rounded: so its end is foreseen."""

import pytest

from qmix.errors import InterruptedRunError
from qmix.quantize import methods
from qmix.quantize.calibrated.layer_work import EXPECTED, HASH, PASS, ROUND, SOLVE
from qmix.quantize.methods import QuantizeRequest, quantize_checkpoint
from qmix.weights.scheme import Recipe, Scheme
from qmix.work_meter import WorkMeter
from tests.support.calibration import INT4, TEXT, run, write_source


class Counted(WorkMeter):
    """Notes what was planned and done, and what was told."""

    def __init__(self, expected=EXPECTED, progress=None):
        self.told = []
        super().__init__(expected, lambda *at: self.told.append(at))
        self.planned = dict.fromkeys(expected, 0.0)

    def plan(self, work):
        super().plan(work)
        for kind, amount in work.items():
            self.planned[kind] += amount

    def drop(self, work):
        super().drop(work)
        for kind, amount in work.items():
            self.planned[kind] -= amount

    def check(self, *kinds):
        assert self._done == pytest.approx(self.planned, rel=1e-9)
        assert {kind for kind, amount in self._done.items() if amount} == set(kinds)
        assert all(
            self.left[kind] == pytest.approx(0, abs=1e-6 * self._done[kind]) for kind in kinds
        )
        what, done, total = self.told[-1]
        assert what == "checksums"
        assert done == pytest.approx(total, rel=1e-6)


MIXED = Recipe(
    (
        (r".*experts\.1\.w1\.weight", Scheme(kind="int8", group_size=32)),
        (r".*(experts|q_proj|k_proj).*", INT4),
    )
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"correct": False},
        {"objective": "loss", "recipe": MIXED},
        {"recipe": Recipe.uniform(INT4, attention=False)},
        {"recipe": MIXED},
    ],
    ids=["all", "uncorrected", "by gradients", "attention in 16 bits", "mixed"],
)
def test_gptq_does_what_it_planned(tmp_path, options):
    source = write_source(tmp_path / "source", num_hidden_layers=1)
    meter = Counted()
    run(source, tmp_path / "out", meter=meter, **options)
    meter.check(PASS, SOLVE, HASH)


def test_a_resumed_run_plans_the_layers_that_are_left(tmp_path):
    source, whole, rest = write_source(tmp_path / "source"), Counted(), Counted()
    with pytest.raises(InterruptedRunError):
        run(source, tmp_path / "out", meter=whole, interrupted=lambda: True)
    run(source, tmp_path / "out", meter=rest, resumed=True)
    rest.check(PASS, SOLVE, HASH)
    assert rest.planned[SOLVE] == pytest.approx(whole.planned[SOLVE] / 2)


@pytest.mark.parametrize(("attention", "layers"), [(True, 2), (False, 1)])
def test_auto_counts_its_measuring_too(tmp_path, monkeypatch, attention, layers):
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_local_experts": 2}
    source = write_source(tmp_path / "source", num_hidden_layers=layers, **sizes)
    meters = []
    monkeypatch.setattr(
        methods, "WorkMeter", lambda *settings: meters.append(Counted(*settings)) or meters[-1]
    )
    request = QuantizeRequest(
        method="auto", samples=2, seqlen=32, device="cpu", attention=attention
    )
    quantize_checkpoint(source, tmp_path / "out", request, TEXT)
    (meter,) = meters
    meter.check(PASS, SOLVE, ROUND, HASH)
    first = next(what for what, done, total in meter.told if done)
    assert first.startswith("measuring layer 1")
