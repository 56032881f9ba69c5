"""Commands that are given a name of the hub; `qmix pull`, `list` and `rm`."""

import json
import signal
import subprocess
import time

import pytest

from qmix.errors import CUT_REPLY
from tests.support import fake_hub
from tests.support.process import QMIX, qmix, started

HEADERS = 500_000  # bytes that the tiny model's headers and texts take


@pytest.fixture(autouse=True)
def _state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_chat_from_an_empty_cache_to_a_reply_and_offline_afterwards(org_tiny, monkeypatch):
    chat = ("chat", "org/tiny", "--max-new-tokens", "4", "--temperature", "0")
    first = qmix(*chat, stdin="def f(\n")
    assert first.returncode == CUT_REPLY, first.stderr
    assert "download org/tiny@c0ffee0: 3 files of safetensors, 0.01 GB (not" in first.stderr
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    org_tiny.requests.clear()
    offline = qmix(*chat, stdin="def f(\n")
    assert (offline.returncode, offline.stdout) == (CUT_REPLY, first.stdout)
    assert first.stdout.strip()
    assert "download" not in offline.stderr
    assert org_tiny.requests == []
    missing = qmix("chat", "org/other", stdin="")
    assert missing.returncode == 3
    assert "HF_HUB_OFFLINE is set" in missing.stderr


def test_plan_and_inspect_read_headers_and_name_the_repository(org_tiny):
    plan = qmix("plan", "org/tiny", "--ram", "8G")
    assert plan.returncode == 0, plan.stderr
    assert "org/tiny@c0ffee0" in plan.stdout
    inspect = json.loads(qmix("inspect", "org/tiny", "--json").stdout)
    assert (inspect["directory"], inspect["parameters"]) == ("org/tiny", 6_266_624)
    assert org_tiny.sent < 2 * HEADERS


def test_pull_list_and_rm(org_tiny, tmp_path):
    assert "no models" in qmix("list", cwd=tmp_path).stdout
    pulled = qmix("pull", "hf://org/tiny")
    folder = pulled.stdout.strip()
    assert folder.endswith(f"models--org--tiny/snapshots/{fake_hub.COMMIT}")
    assert "download org/tiny@c0ffee0: 3 files" in pulled.stderr
    made = tmp_path / "made" / "nf4"
    made.parent.mkdir()
    assert qmix("quantize", "org/tiny", made).returncode == 0
    rows = json.loads(qmix("list", "--json", cwd=tmp_path).stdout)["models"]
    assert [(row["name"], row["place"], row["bits"], row["layout"]) for row in rows] == [
        ("org/tiny", "hub", 16.0, "safetensors bfloat16"),
        (str(made), "folder", 6.264, "bitsandbytes nf4 b64 double-quant"),
    ]
    refused = qmix("rm", "org/tiny")
    assert refused.returncode == 2
    assert "--yes removes without asking" in refused.stderr
    (made / "mine.txt").write_text("")
    refused = qmix("rm", made, "--yes")
    assert refused.returncode == 2
    assert "found mine.txt" in refused.stderr
    (made / "mine.txt").unlink()
    assert qmix("rm", "org/tiny", made, "--yes").returncode == 0
    assert not made.exists()
    assert "no models" in qmix("list", cwd=tmp_path).stdout
    assert qmix("rm", "org/tiny", "--yes").returncode == 3
    assert qmix("pull", "./org").returncode == 2


def test_a_download_is_asked_for_on_a_terminal(org_tiny, monkeypatch):
    from qmix.commands import terminal

    monkeypatch.setattr("qmix.commands.sources.is_terminal", lambda: True)
    answers = []
    monkeypatch.setattr(terminal, "asked", lambda question: answers.append(question))
    done = qmix("verify", "org/tiny")
    assert (done.returncode, answers) == (1, ["Download?"])
    assert "nothing was downloaded. --yes" in done.stderr
    assert qmix("verify", "org/tiny", "--yes").returncode == 0
    assert len(answers) == 1


def test_what_cannot_be_written_is_said_before_a_download(org_tiny, tmp_path):
    for command in (["quantize"], ["export", "--format", "nf4"], ["convert"]):
        done = qmix(command[0], "org/tiny", tmp_path, *command[1:])
        assert done.returncode == 2, done.stderr
        assert "OUT" in done.stderr
    assert org_tiny.sent == 0
    done = qmix("quantize", "org/tiny", tmp_path / "x", "--method", "gptq", "--discard-source")
    assert "--discard-source does not apply to --method gptq" in done.stderr
    done = qmix("quantize", "evals/tiny", tmp_path / "x", "--discard-source")
    assert "nothing of yours is removed" in done.stderr


def test_a_typo_of_a_path_says_that_there_is_no_such_folder(hub):
    done = qmix("inspect", "org/typo")
    assert done.returncode == 3
    assert "org/typo: neither a folder here nor a repository on the hub" in done.stderr


def test_ctrl_c_ends_a_download_at_once(hub, tiny, tmp_path):
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()
    files = {name: fake_hub.Virtual(b"", 1 << 30) for name in shards}
    hub.add("org/long", tiny, **{"model.safetensors.index.json": index, **files})
    hub.pause_s = 0.001
    command = [*QMIX, "pull", "org/long"]
    with started(
        command, stderr=subprocess.PIPE, environment=hub.environment(tmp_path / "another")
    ) as process:
        while hub.sent < 5_000_000:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130  # and not after 16 GB
    assert hub.sent < 1 << 30
