"""`qmix batch`: one result a line, in order, the same as `qmix generate`, after any end."""

import json
import os
import signal
import time
from contextlib import closing

import pytest

from qmix.errors import QmixError, UsageError
from qmix.generation.config import GenerationConfig
from qmix.serving.batch.answering import ahead, answers
from qmix.serving.batch.prompt_lines import Asking, PromptLine, prompt_lines
from qmix.serving.batch.result_file import results
from qmix.serving.engine import Engine
from qmix.serving.limits import Limits
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import TINY, small_model
from tests.support.process import QMIX, qmix, started
from tests.support.promptness import within

PROMPTS = [f"def add_{index}(a, b):\n    return" for index in range(12)]


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(model, tmp_path, *more):
    return (
        "batch",
        model,
        tmp_path / "in.jsonl",
        tmp_path / "out.jsonl",
        "--max-new-tokens",
        "6",
        *more,
    )


def test_each_line_gets_one_result_in_order_equal_to_generate(tiny_nf4, tmp_path):
    lines = [{"prompt": prompt} for prompt in PROMPTS]
    lines[2] = {"prompt": 3}
    lines[4] = {"messages": [{"role": "user", "content": "Hello"}], "id": "x", "max_new_tokens": 2}
    written(tmp_path / "in.jsonl", lines)
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write("\nnot json")
    done = qmix(*command(tiny_nf4, tmp_path, "--slots", "3"))
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "out.jsonl")
    assert [each["line"] for each in found] == list(range(14))
    assert [number for number, each in enumerate(found) if "error" in each] == [2, 12, 13]
    assert found[2]["error"] == "line 3: prompt: wrong type; expected a string"
    assert (found[4]["id"], found[4]["new_tokens"]) == ("x", 2)
    for number in (0, 11):
        alone = qmix("generate", tiny_nf4, PROMPTS[number], "--max-new-tokens", "6", "--json")
        for field in ("text", "finish", "prompt_tokens", "new_tokens"):
            assert found[number][field] == json.loads(alone.stdout)[field]


def test_a_run_goes_on_and_a_torn_line_is_cut_off(tiny_nf4, tmp_path):
    written(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    assert qmix(*command(tiny_nf4, tmp_path)).returncode == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    for kept in (5, len(whole) // 2):
        (tmp_path / "out.jsonl").write_bytes(whole[:kept])
        assert qmix(*command(tiny_nf4, tmp_path)).returncode == 0
        assert (tmp_path / "out.jsonl").read_bytes() == whole
    other = qmix(*command(tiny_nf4, tmp_path, "--ctx", "64"))
    assert other.returncode == 2
    assert "other prompts or settings" in other.stderr
    assert qmix(*command(tiny_nf4, tmp_path, "--ctx", "64", "--force")).returncode == 0
    assert qmix("batch", tiny_nf4, *[tmp_path / "in.jsonl"] * 2).returncode == 2


@pytest.mark.soak
def test_after_kill_9_each_line_has_one_result(tiny_nf4, tmp_path):
    written(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in PROMPTS * 40])
    out, counts = tmp_path / "out.jsonl", []
    for _ in range(3):
        with started([*QMIX, *map(str, command(tiny_nf4, tmp_path))]) as process, within(60):
            before = counts[-1] if counts else 0
            while not out.exists() or out.read_bytes().count(b"\n") < before + 20:
                time.sleep(0.05)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        counts.append(out.read_bytes().count(b"\n"))
    assert qmix(*command(tiny_nf4, tmp_path)).returncode == 0
    found = read(out)
    assert [each["line"] for each in found] == list(range(480))
    assert {each["text"] for each in found[:12]} == {each["text"] for each in found[-12:]}


def test_results_of_one_process_at_a_time(tmp_path):
    with results(tmp_path / "out", anew=False) as file:
        file.append({"line": 0})
        other = results(tmp_path / "out", anew=False)
        with pytest.raises(UsageError, match="another process"):
            other.__enter__()
    assert read(tmp_path / "out") == [{"line": 0}]


def test_keys_differ_by_line_and_settings():
    lines = list(prompt_lines([b"a\n", b"b\r\n", b"\n", b"c"]))
    assert [line.data for line in lines] == [b"a", b"b", b"", b"c"]
    assert lines[0].key("s") == PromptLine(7, b"a").key("s")
    assert len({line.key(said) for line in lines for said in ("s", "t")}) == 8


WRONG = {
    b"[1]": "expected an object",
    b"{}": "give a prompt or messages",
    b'{"prompt": "a", "messages": []}': "give a prompt or messages",
    b'{"prompt": "a", "temperature": 1}': "unknown field",
    b'{"messages": []}': "a list of turns",
    b'{"messages": [{"role": "tool", "content": ""}]}': "turns of a role",
    b'{"prompt": "a", "max_new_tokens": 0}': "max_new_tokens",
    b'{"prompt": "a", "max_new_tokens": "2"}': "max_new_tokens",
}


@pytest.mark.parametrize("data", WRONG, ids=str)
def test_a_line_that_asks_for_nothing_sensible_is_named(data):
    asking = Asking(LlamaTokenizer.from_pretrained(TINY), GenerationConfig(max_new_tokens=4))
    with pytest.raises(QmixError, match=f"line 2.*{WRONG[data]}"):
        asking.request(PromptLine(1, data))


def test_an_engine_that_fails_ends_the_batch_without_results():
    limits = Limits(context=64, slots=2, waiting=ahead(2))
    tokenizer = LlamaTokenizer.from_pretrained(TINY)
    with closing(Engine(small_model(vocab_size=len(tokenizer)), tokenizer, limits)) as engine:
        asking = Asking(tokenizer, GenerationConfig(max_new_tokens=4))
        lines = prompt_lines(json.dumps({"prompt": prompt}).encode() for prompt in PROMPTS)
        found = answers(engine, asking, lines, "s")
        assert next(found)["line"] == 0
        engine.close(0.0)
        with pytest.raises(QmixError, match=r"was closed|takes no requests"):
            list(found)


def test_a_seed_is_the_lines_own():
    asking = Asking(LlamaTokenizer.from_pretrained(TINY), GenerationConfig(seed=5))
    first, second = (asking.request(PromptLine(n, b'{"prompt": "a"}')) for n in (0, 1))
    assert (first.config.seed, second.config.seed) == (5, 6)
