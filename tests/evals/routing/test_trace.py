"""Traces: the file, what is wrong with a wrong one, recording from a model, and the commands."""

import json
from dataclasses import replace

import pytest
import torch

from qmix import MixtralForCausalLM
from qmix.errors import CheckpointError, UsageError
from qmix.evals.routing import record, replay, trace
from qmix.evals.routing.simulation import SimulatedMachine
from qmix.evals.routing.trace import TraceHeader, TraceRecorder
from qmix.experts.policy import PRESETS
from qmix.models.offload import Tiers
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import ROOT, TINY, load_in_tiers, small_model
from tests.support.process import qmix, succeeds

GOLDEN = ROOT / "tests" / "golden" / "tiny.trace"  # qmix trace record evals/tiny --data LICENSE
HEADER = TraceHeader(layers=3, experts=8, chosen=2, model="small", expert_bytes=7, dense_bytes=9)
TOKENS = [[(1, 5), (0, 3), (7, 2)], [(6, 5), (4, 3), (0, 1)]]
GATES = [[(40000, 25536), (65536, 0), (32768, 32768)], [(40000, 25536)] * 3]


def written(path, header=HEADER, gates=()):
    with TraceRecorder(path, header) as recorder:
        for at, token in enumerate(TOKENS):
            recorder.token(token, gates[at] if gates else ())
    return path


def test_what_was_recorded_is_read(tmp_path):
    found = trace.read_trace(written(tmp_path / "t"))
    assert found.header == HEADER
    assert found.tokens == tuple(map(tuple, TOKENS))
    assert found.gates == ()
    assert next(found.ids()) == [[1, 5], [8, 11], [23, 18]]
    lines = (tmp_path / "t").read_text().splitlines()
    assert json.loads(lines[0])["format"] == "qmix-trace"
    assert lines[1:] == ["1,5 0,3 7,2", "6,5 4,3 0,1"]


def test_gates_are_recorded_on_request(tmp_path):
    with_gates = TraceHeader(layers=3, experts=8, chosen=2, gates=True)
    found = trace.read_trace(written(tmp_path / "t", with_gates, GATES))
    assert found.tokens == tuple(map(tuple, TOKENS))
    assert found.gates == tuple(map(tuple, GATES))


def test_a_recorder_replaces_no_file(tmp_path):
    path = written(tmp_path / "t")
    before = path.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        TraceRecorder(path, HEADER)
    assert path.read_bytes() == before
    with pytest.raises(CheckpointError, match="cannot be written"):
        TraceRecorder(tmp_path / "none" / "t", HEADER)


def header_line(**changes):
    base = {"format": "qmix-trace", "version": 1, "layers": 3, "experts": 8, "chosen": 2}
    return json.dumps({**base, **changes}) + "\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a trace; .* found an empty file"),
        ("hello\n", "not a trace; .* found hello"),
        (header_line(version=2) + "1,5 0,3 7,2\n", "found qmix-trace 2"),
        (header_line(format="other"), "found other 1"),
        (header_line(layers=0), "layers: out of range"),
        (header_line(chosen="2"), "chosen: wrong value"),
        (header_line(gates=1), "gates: wrong value"),
        (header_line(expert_bytes=-1), "negative size"),
        (header_line(surprise=1), "surprise: wrong value"),
        (header_line(), "no token"),
        (header_line() + "1,5 0,3\n", "line 2: damaged; expected 3 layers; found 2"),
        (header_line() + "1,5 0,3 7,2\n1,5 0,3 7\n", "line 3: damaged; expected 2 different"),
        (header_line() + "1,5 0,3 7,7\n", "2 different experts"),
        (header_line() + "1,5 0,3 7,x\n", "2 different experts"),
        (header_line() + "1,5 0,3 7,-2\n", "2 different experts"),
        (header_line() + "1,5 0,3 7,²\n", "2 different experts"),
        (header_line() + "1,5 0,3 7,8\n", "experts 0 to 7; found 8"),
        (header_line() + "1:2,5:3 0:1,3:1 7:1,2:1\n", "2 different experts"),
        (header_line(gates=True) + "1,5 0,3 7,2\n", "2 different experts"),
        (header_line() + "\n", "expected 3 layers"),
    ],
)
def test_a_damaged_trace_gets_one_line_that_names_the_place(tmp_path, text, says):
    path = tmp_path / "t"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=says) as caught:
        trace.read_trace(path)
    assert str(path) in str(caught.value)


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        trace.read_trace(tmp_path / "none")
    with pytest.raises(CheckpointError, match="found a directory"):
        trace.read_trace(tmp_path)
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 9)
    with pytest.raises(CheckpointError, match="not a trace"):
        trace.read_trace(tmp_path / "binary")


class Words:
    """A tokenizer of small_model: a character, a token."""

    def encode(self, text):
        return [ord(c) % 128 for c in text]


def chosen(model, ids):
    """Each layer's top two, by the router's logits of the public forward."""
    out = model(torch.tensor([ids]), output_router_logits=True)
    return [
        tuple(frozenset(layer[at].topk(2).indices.tolist()) for layer in out.router_logits)
        for at in range(len(ids))
    ]


def recorded(path):
    return [tuple(frozenset(choice) for choice in token) for token in trace.read_trace(path).tokens]


@torch.no_grad()
def test_a_text_is_recorded_as_its_routers_choose(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "PREFILL_CHUNK", 7)
    model = small_model(max_position_embeddings=20)
    text = "The quick brown fox jumps over the lazy dog."
    ids = Words().encode(text)
    count = record.record_trace(
        model, Words(), tmp_path / "t", name="small", max_new_tokens=33, text=text, gates=True
    )
    assert count == 33
    # Two windows of the model's 20 positions.
    assert recorded(tmp_path / "t") == chosen(model, ids[:20]) + chosen(model, ids[20:33])
    found = trace.read_trace(tmp_path / "t")
    assert all(abs(sum(g) - 65536) <= 1 for token in found.gates for g in token)
    config = model.config
    assert found.header.expert_bytes == 3 * 4 * config.hidden_size * config.intermediate_size
    shared = sum(p.nbytes for name, p in model.named_parameters() if ".experts." not in name)
    rest = (config.vocab_size - 1) * config.hidden_size * 4  # one row of the embedding is read
    assert found.header.dense_bytes == shared - rest


@torch.no_grad()
def test_after_a_prompt_the_decoded_tokens_alone_are_recorded(tmp_path):
    model, prompt = small_model(), "Hello"
    ids = torch.tensor([Words().encode(prompt)])
    whole = model.generate(ids, max_new_tokens=9)[0].tolist()
    count = record.record_trace(
        model, Words(), tmp_path / "t", name="small", max_new_tokens=9, prompt=prompt
    )
    assert count == 8  # the ninth token is never fed back
    assert recorded(tmp_path / "t") == chosen(model, whole[:-1])[5:]


def test_recording_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(UsageError, match="positions"):
        record.record_trace(
            small_model(), Words(), tmp_path / "t", name="", max_new_tokens=999, prompt="x"
        )
    assert not (tmp_path / "t").exists()


def test_the_committed_trace_is_what_the_tiny_model_chooses(tmp_path):
    """Again on this machine; other processors round otherwise, so a few choices may differ."""
    model = MixtralForCausalLM.from_pretrained(TINY)
    tokenizer = LlamaTokenizer.from_pretrained(TINY)
    text = (ROOT / "LICENSE").read_text()
    golden = trace.read_trace(GOLDEN)
    record.record_trace(
        model,
        tokenizer,
        tmp_path / "t",
        name="tiny",
        max_new_tokens=len(golden.tokens),
        text=text,
    )
    again = trace.read_trace(tmp_path / "t")
    assert again.header == golden.header
    pairs = zip(recorded(tmp_path / "t"), recorded(GOLDEN), strict=True)
    same = [a == b for now, then in pairs for a, b in zip(now, then, strict=True)]
    assert sum(same) >= 0.98 * len(same)


NEW = 110


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """The ids of a prompt, and the trace of NEW tokens that the tiny model writes after it."""
    model = MixtralForCausalLM.from_pretrained(TINY)
    tokenizer = LlamaTokenizer.from_pretrained(TINY)
    path, prompt = tmp_path_factory.mktemp("trace") / "t", (ROOT / "LICENSE").read_text()[:400]
    record.record_trace(model, tokenizer, path, name="tiny", max_new_tokens=NEW, prompt=prompt)
    return torch.tensor([tokenizer.encode(prompt)]), trace.read_trace(path)


@pytest.mark.parametrize("name", ["heat", "lru", "lfu"])
def test_a_replay_predicts_what_the_store_counts(decoded, name):
    """The disk tier decodes; the trace of the same tokens through the same policy hits as often."""
    (ids, routed), slots = decoded, 11
    chosen = replace(PRESETS[name], uploads=0)
    predicted = replay.replay(routed, slots, chosen, SimulatedMachine(), name=name, path="copy")
    tiers = Tiers(device=0, host=slots, settings=chosen)
    model = load_in_tiers(TINY, "cpu", tiers=tiers)
    model.generate(ids, max_new_tokens=NEW)
    counted = model.store.statistics()
    assert counted.tokens == predicted.tokens > 100
    assert counted.hits + counted.misses == predicted.hits + predicted.misses
    assert abs(counted.hit_rate - predicted.hit_rate) < 0.01


def test_the_commands_record_and_replay(tmp_path):
    out = tmp_path / "tiny.trace"
    result = qmix(
        "trace", "record", TINY, "Return the", "--out", out, "--max-new-tokens", 40, "--gates"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert "tokens" in result.stderr
    result = qmix("trace", "replay", out, "--slots", 16, "--json", "--profile", GOLDEN)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["experts"] == 24
    rows = {(row["name"], row["path"]): row for row in document["replays"]}
    assert set(rows) == {
        ("heat", "read"), ("heat", "cpu"), ("lru", "copy"), ("belady", "read"), ("belady", "cpu")
    }  # fmt: skip
    assert all(row["hit_rate"] <= rows["belady", "read"]["hit_rate"] for row in rows.values())
    header = trace.read_trace(out).header
    assert document["machine"]["expert_bytes"] == header.expert_bytes > 0
    drawn = qmix("trace", "replay", out, "--slots", 16, "--expert-mb", 93.6, "--policy", "lfu")
    assert drawn.stdout.count("\n") == 7
    assert "| lfu | read over PCIe |" in drawn.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["replay", "/nowhere", "--slots", "4"], 3),
        (["replay", "README.md", "--slots", "4"], 3),
        (["replay", GOLDEN, "--slots", "25"], 2),
        (["replay", GOLDEN, "--slots", "0"], 2),
        (["replay", GOLDEN, "--slots", "4", "--policy", "magic"], 2),
        (["replay", GOLDEN, "--slots", "4", "--profile", "README.md"], 3),
        (["record", "evals/tiny", "--out", "/tmp/qmix-never-written"], 2),
        (
            ["record", "evals/tiny", "hi", "--data", "LICENSE", "--out", "/tmp/qmix-never-written"],
            2,
        ),
        (["record", "evals/tiny", "hi", "--out", GOLDEN], 2),
        (["record", "/nowhere", "hi", "--out", "/tmp/qmix-never-written"], 3),
        (["record", "evals/tiny", "hi", "--out", "/nowhere/t"], 3),
    ],
)
def test_bad_input_gets_one_line_and_its_exit_code(arguments, code):
    result = qmix("trace", *arguments)
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if "Usage:" not in result.stderr:
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("qmix: ")


def test_replaying_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from qmix.experts import heat_file, policy, residency\n"
        "from qmix.evals.routing import replay, simulation, trace\n"
        f"sys.argv = ['qmix', 'trace', 'replay', {str(GOLDEN)!r}, '--slots', '12']\n"
        "from qmix.cli import main; main()"
    )
    assert "| belady |" in succeeds(code)


def test_a_profile_of_another_model_is_refused(tmp_path):
    other = written(tmp_path / "t", TraceHeader(layers=3, experts=9, chosen=2))
    result = qmix("trace", "replay", GOLDEN, "--slots", 4, "--profile", other)
    assert result.returncode == 2
    assert "3 layers of 8 experts" in result.stderr
