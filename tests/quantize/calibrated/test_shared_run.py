"""A calibrated run that several processes share: the bytes of one, also after one was lost."""

from functools import partial

import pytest

from qmix.errors import CheckpointError, InterruptedRunError
from qmix.quantize.calibrated.helper import help_quantize
from qmix.quantize.calibrated.options import CalibratedOptions, LayerOptions
from qmix.quantize.source import open_source
from tests.support.calibration import QUICK, WINDOW, contents, run, spoil, write_source
from tests.support.process_group import together

pytestmark = pytest.mark.usefixtures("one_thread")

LOSS = CalibratedOptions(layer=LayerOptions(rounding=QUICK))


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Four experts of which a token has three, and a batch a window."""
    monkeypatch.setattr("qmix.quantize.calibrated.shared_windows.BATCH_TOKENS", WINDOW)
    monkeypatch.setattr("qmix.quantize.calibrated.token_stream.BATCH_TOKENS", WINDOW)
    monkeypatch.setattr("qmix.quantize.calibrated.loss_gradients._BATCH_TOKENS", WINDOW)
    return write_source(tmp_path / "source", num_experts_per_tok=3)


def shared(source, out, processes, **options):
    lead = partial(run, source, out, objective="loss", **options)
    follow = partial(help_quantize, lambda: open_source(source), LOSS)
    leader = lambda group: lead(group=group)  # noqa: E731
    helper = lambda group: follow(group=group)  # noqa: E731
    return together(leader, *[helper] * (processes - 1))[0]


def test_three_processes_write_the_bytes_of_one_and_one_goes_on_where_they_were(source, tmp_path):
    report = run(source, tmp_path / "one", objective="loss")
    once = iter([True])
    with pytest.raises(InterruptedRunError):
        shared(source, tmp_path / "three", 3, interrupted=lambda: next(once, False))
    work = tmp_path / "three.partial"
    assert not list(work.glob("*.writing"))
    resumed = run(source, tmp_path / "three", objective="loss", resumed=True)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    assert [r.output_error for r in resumed.tensors] == [r.output_error for r in report.tensors]


def test_two_processes_go_on_where_one_was_lost(source, tmp_path):
    run(source, tmp_path / "one", objective="loss")
    layers = []

    def help_until_lost(group):
        def exchange(items):
            found = group.exchange(items)
            layers.extend(item for item in found if item == ("layer", 1))
            if layers:
                raise SystemExit("killed")
            return found

        lossy = type(group)(group.rank, group.size, exchange)
        help_quantize(lambda: open_source(source), LOSS, lossy)

    with pytest.raises(SystemExit):
        together(
            lambda group: run(source, tmp_path / "two", objective="loss", group=group),
            help_until_lost,
        )
    shared(source, tmp_path / "two", 2, resumed=True)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_what_is_wrong_with_an_expert_is_said_by_whoever_has_it(source, tmp_path):
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    spoil(source, name, float("nan"))
    with pytest.raises(CheckpointError, match=r"experts\.3\.w2"):
        shared(source, tmp_path / "out", 2)
