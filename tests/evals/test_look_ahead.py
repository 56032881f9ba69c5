"""The model of a disk that reads ahead: bounds that any such disk keeps."""

import pytest

from qmix.evals.routing import look_ahead
from qmix.evals.routing.look_ahead import drawn, token_ms

ROUTER, EXPERT = look_ahead._ROUTER_MS, look_ahead._EXPERT_MS


@pytest.fixture(scope="module")
def tokens():
    return list(drawn())[:20]


def test_without_a_wait_a_token_takes_what_it_computes(tokens):
    assert token_ms(tokens, 8, 80, 0.0, 0) == pytest.approx(32 * (ROUTER + 2 * EXPERT))
    always = [[[0, 1], [8, 9]]] * 5
    assert token_ms(always, 8, 16, 50.0, 0) == pytest.approx(2 * (ROUTER + 2 * EXPERT))


def test_guesses_gain_what_the_disk_would_idle_and_no_more(tokens):
    plain = token_ms(tokens, 8, 40, 20.0, 0)
    half, all_right = (token_ms(tokens, 8, 40, 20.0, right) for right in (0.5, 1.0))
    assert all_right < half < plain
    assert plain - all_right <= 31 * (ROUTER + 2 * EXPERT)


def test_the_command_takes_a_trace_or_draws_tokens(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(look_ahead, "_DRAWN", 3)
    lines = ['{"format": "qmix-trace", "version": 1, "layers": 2, "experts": 8, "chosen": 2}']
    path = tmp_path / "trace"
    path.write_text("\n".join([*lines, "0,1 2,3", "0,5 2,7"]) + "\n")
    few = ["--slots", "4", "--disk", "2", "--right", "0.9"]
    for given in ([str(path)], []):
        assert look_ahead.main([*given, *few]) == 0
        assert "disk of twice the rate" in capsys.readouterr().out
