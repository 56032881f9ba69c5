"""Windows scored in parts: the same numbers to the bit, a folder that a run goes on from."""

from functools import partial

import pytest
import torch

from qmix.errors import QmixError, WriteError
from qmix.evals.quality.evaluation import WholeText, score_all
from qmix.evals.quality.texts import Text
from qmix.evals.quality.token_scores import TokenScores
from qmix.evals.quality.windows import ScoringWindows, whole_windows
from qmix.evals.sharing import score_together as together
from qmix.evals.sharing.batches import apart, batches, chosen, flat, joined
from qmix.evals.sharing.score_folder import ScoreFolder, run_name
from qmix.evals.sharing.score_together import score_together
from qmix.processes import group, launch
from qmix.processes.group import ALONE
from tests.support.process import qmix, qmix_apart

WINDOWS = whole_windows(torch.arange(10 * 1024).reshape(10, 1024), "ten windows")


def told(windows, *, models=2):
    """Scores that say which id they are of."""
    window, position = windows.scored.nonzero(as_tuple=True)
    ids = windows.ids[window, position].float()
    return tuple(
        TokenScores(window, position, ids + model, ids > 4, None) for model in range(models)
    )


def same(ours, theirs):
    return all(map(torch.equal, flat(ours), flat(theirs)))


def test_batches_are_whole_passes():
    assert batches(WINDOWS) == [range(4), range(4, 8), range(8, 10)]
    rows = [range(4, 8), range(8, 10)]
    part = chosen(WINDOWS, rows)
    assert part.ids[0, 0] == 4 * 1024
    first, second = apart(told(part)[0], rows)
    assert sorted(set(second.window.tolist())) == [8, 9]
    (whole, _) = told(WINDOWS)
    assert same(
        joined([apart(told(chosen(WINDOWS, [range(4)]))[0], [range(4)])[0], first, second]), whole
    )


def test_what_a_folder_holds_is_not_computed_again(tmp_path):
    folder = ScoreFolder(tmp_path, "a run")
    asked = []

    def score(windows):
        asked.append(len(windows.ids))
        return told(windows)

    expected = told(WINDOWS)
    for counts in ([10], []):
        found = score_together(WINDOWS, score, folder, ALONE)
        assert (asked, [same(*pair) for pair in zip(found, expected, strict=True)]) == (
            counts,
            [True, True],
        )
        asked.clear()
    files = sorted(tmp_path.rglob("*.npz"))
    files[0].write_bytes(files[0].read_bytes()[:50])  # a damaged one counts as missing
    files[2].unlink()
    assert same(score_together(WINDOWS, score, folder, ALONE)[1], expected[1])
    assert asked == [6]
    score_together(WINDOWS, score, ScoreFolder(tmp_path, "b run"), ALONE)
    assert asked == [6, 10]


def test_a_run_that_fails_keeps_what_it_had(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "_KEPT_TOGETHER", 1)
    folder = ScoreFolder(tmp_path, "a run")

    def score(windows, *, limit):
        if int(windows.ids[0, 0]) >= limit:
            raise QmixError("the power went off")
        return told(windows)

    with pytest.raises(QmixError, match="power"):
        score_together(WINDOWS, partial(score, limit=8 * 1024), folder, ALONE)
    assert len(list(tmp_path.rglob("*.npz"))) == 2
    assert same(score_together(WINDOWS, told, folder, ALONE)[0], told(WINDOWS)[0])


def test_runs_differ_by_model_text_and_computation(tiny, tiny_nf4):
    other = ScoringWindows(WINDOWS.ids + 1, WINDOWS.scored, WINDOWS.protocol)
    names = {
        run_name([tiny], WINDOWS, ("float32",)),
        run_name([tiny_nf4], WINDOWS, ("float32",)),
        run_name([tiny, tiny_nf4], WINDOWS, ("float32",)),
        run_name([tiny], other, ("float32",)),
        run_name([tiny], WINDOWS, ("bfloat16",)),
    }
    assert len(names) == 5
    assert run_name([tiny], WINDOWS, ("float32",)) in names


def test_a_models_scores_in_parts_are_those_of_one_pass(tiny_nf4, monkeypatch):
    text = Text.of("Return a list of the names in the current scope. " * 14)
    monkeypatch.setattr("qmix.evals.quality.layer_streaming.BATCH_TOKENS", 64)

    def in_parts(windows, score):
        rows = batches(windows)
        assert len(rows) > 2
        parts = [score(chosen(windows, group))[0] for group in (rows[:2], rows[2:])]
        return (joined([*apart(parts[0], rows[:2]), *apart(parts[1], rows[2:])]),)

    score = partial(score_all, [tiny_nf4], WholeText(text, 32), reference=tiny_nf4, device="cpu")
    (whole,), (parts,) = score()[1], score(share=in_parts)[1]
    assert len(flat(whole)) == 7
    assert same(whole, parts)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file"):
        ScoreFolder(tmp_path / "file", "a run")


def test_the_command_line_of_a_process_has_no_number_of_processes():
    words = ["eval", "m", "--processes", "2", "--json", "--processes=4"]
    assert launch.without_option(words, "--processes") == ["eval", "m", "--json"]


def test_the_command_goes_on_from_a_folder_and_says_what_is_missing(
    tiny_nf4, tmp_path, monkeypatch
):
    data = tmp_path / "text.txt"
    data.write_text("Return a list of the names in the current scope. " * 20)
    command = ("eval", tiny_nf4, "--data", data, "--ctx", "64", "--json")
    plain, kept, again = (
        qmix(*command, *more) for more in ((), *[("--scores", tmp_path / "s")] * 2)
    )
    assert plain.stdout == kept.stdout == again.stdout
    assert len(list((tmp_path / "s").rglob("*.npz"))) == 1
    assert qmix(*command, "--needle", "1", "--processes", "2").returncode == 2
    monkeypatch.setattr(group, "find_spec", lambda name: None)
    refused = qmix(*command, "--processes", "2")
    assert refused.returncode == 3
    assert "pip install 'qmix-runtime[scale]'" in refused.stdout


@pytest.mark.soak
def test_several_processes_score_as_one_and_a_lost_one_is_named(tiny_nf4, tmp_path):
    pytest.importorskip("accelerate")
    data = tmp_path / "text.txt"
    data.write_text("Return a list of the names in the current scope. " * 600)
    command = ("eval", tiny_nf4, "--data", data, "--ctx", "256", "--json")
    one, two = qmix_apart(*command), qmix_apart(*command, "--processes", "2")
    assert one.returncode == two.returncode == 0
    assert one.stdout == two.stdout
