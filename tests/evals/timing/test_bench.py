"""`qmix bench`: llama-bench's grammar, what is counted as read, and the command itself."""

import json

import pytest
import torch

from qmix.errors import UsageError
from qmix.evals.timing import bandwidth, bench, traffic
from qmix.evals.timing.bench import BenchTest
from tests.support.models import TINY, small_model
from tests.support.process import qmix


def test_the_grammar():
    tests = bench.parse_tests("512", "128", "0,4096", "1,8")
    assert [(str(test), test.batch) for test in tests] == [
        ("pp512", 1), ("tg128", 1), ("pp512 @ d4096", 1), ("tg128 @ d4096", 1),
        ("pp512", 8), ("tg128", 8), ("pp512 @ d4096", 8), ("tg128 @ d4096", 8),
    ]  # fmt: skip
    assert [str(test) for test in bench.parse_tests("0", "16,32", "0", "1")] == ["tg16", "tg32"]


@pytest.mark.parametrize(
    "lists",
    [("x", "1", "0", "1"), ("-1", "1", "0", "1"), ("1", "1", "0", "0"), ("0", "0", "0", "1")],
)
def test_what_is_no_test_is_refused(lists):
    with pytest.raises(UsageError):
        bench.parse_tests(*lists)


def test_a_test_beyond_the_models_positions_is_refused():
    with pytest.raises(UsageError, match="positions"):
        bench.run_bench(small_model(), [BenchTest(kind="pp", tokens=512)], name="small")


def test_bandwidth_is_bytes_read_and_written_a_second(monkeypatch):
    monkeypatch.setattr(bandwidth, "seconds", lambda work, device: 0.5)
    assert bandwidth.copy_bandwidth(torch.device("cpu"), 1 << 20) == 2 * (1 << 20) / 0.5
    assert bandwidth.matmul_rate(torch.device("cpu"), torch.float32, 8) == 2 * 8**3 / 0.5


def expert_bytes(model):
    return 3 * model.config.hidden_size * model.config.intermediate_size * 4


def test_distinct_experts_are_counted_once():
    """Two equal rows choose what one row chooses; then the router sends all rows to two experts."""
    model = small_model()
    one, two = (model.new_cache(rows, 8) for rows in (1, 2))
    first = traffic.step_traffic(model, torch.tensor([[7]]), one)
    second = traffic.step_traffic(model, torch.tensor([[7], [7]]), two)
    assert first.distinct_experts == second.distinct_experts == 2
    assert second.weights - first.weights == model.config.hidden_size * 4  # one embedding row
    assert second.cache == 2 * first.cache
    shared = sum(p.nbytes for name, p in model.named_parameters() if ".experts." not in name)
    shared -= model.model.embed_tokens.weight.nbytes - model.config.hidden_size * 4
    assert first.weights == shared + 3 * 2 * expert_bytes(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.block_sparse_moe.gate.weight.zero_()  # topk of equal logits: one choice for all
    many = traffic.step_traffic(model, torch.arange(8)[:, None], model.new_cache(8, 8))
    assert many.distinct_experts == 2


def test_the_cache_counts_by_what_it_holds():
    model = small_model()
    cache = model.new_cache(1, 100)
    model.next_logits(torch.arange(9)[None], cache)
    found = traffic.step_traffic(model, torch.tensor([[7]]), cache)
    assert found.cache == 2 * 3 * 2 * 10 * 8 * 4  # keys and values, layers, heads, positions, width


def test_all_weights_are_counted():
    model = small_model()
    assert traffic.weight_count(model) == sum(p.numel() for p in model.parameters())
    assert traffic.weight_bytes(model) == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("kind", ["pp", "tg"])
@pytest.mark.parametrize("depth", [0, 5])
def test_a_measurement(kind, depth, monkeypatch):
    """Times are made up; what is run, and what follows from the times, is checked."""
    model, calls = small_model(), []

    def fake(work, device):
        before = steps[0]
        work()
        calls.append(steps[0] - before)
        return 0.25 * len(calls)

    steps = [0]
    plain = type(model).next_logits

    def next_logits(self, ids, *args, **options):
        steps[0] += ids.shape[1]
        return plain(self, ids, *args, **options)

    monkeypatch.setattr(type(model), "next_logits", next_logits)
    monkeypatch.setattr(bench, "seconds", fake)
    test = BenchTest(kind=kind, tokens=6, depth=depth, batch=2)
    found = bench.measure_test(model, test, 2, bound=1e6)
    assert calls == [6, 6]  # a pass over each token, from the same depth again
    assert found.seconds == (0.25, 0.5)
    assert found.tokens_per_second == (48 + 24) / 2
    assert found.deviation == pytest.approx(12 * 2**0.5)
    assert found.peak_bytes > 1 << 20
    if kind == "pp":
        assert found.bandwidth is None
    else:
        assert found.bandwidth == pytest.approx(found.bytes_per_step * 36 / 2)
        assert found.of_bound == pytest.approx(found.bandwidth / 1e6)
        assert 2 <= found.distinct_experts <= 4
    assert f"{test}" == f"{kind}6" + (" @ d5" if depth else "")


def test_the_command(tiny_nf4):
    result = qmix(
        "bench", tiny_nf4, "-p", "8", "-n", "4", "-d", "0,16", "-b", "1,2", "-r", "2", "--device", "cpu"
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    header, _, *tests = rows
    assert [(row[header.index("batch")], row[header.index("test")]) for row in tests] == [
        (batch, test + depth)
        for batch in ("1", "2")
        for depth in ("", " @ d16")
        for test in ("pp8", "tg4")
    ]
    assert all("±" in row[header.index("t/s")] for row in tests)
    assert "a copy in the same run" in result.stdout


def test_the_command_in_json(tiny_nf4):
    result = qmix("bench", tiny_nf4, "-p", "0", "-n", "3", "-r", "1", "--device", "cpu", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    (one,) = document["measurements"]
    assert (one["test"], one["batch"], len(one["seconds"])) == ("tg3", 1, 1)
    assert 0 < one["of_bound"] < 2
    assert document["weights"] == sum(
        p.numel() for p in __import__("qmix").MixtralForCausalLM.from_pretrained(TINY).parameters()
    )
    assert document["size"] < 2 * document["weights"]


def test_bad_lists_end_the_command(tiny_nf4):
    result = qmix("bench", tiny_nf4, "-p", "many")
    assert result.returncode == 2
    assert "whole number" in result.stderr


def report(*measurements):
    return bench.BenchReport(
        model="tiny", size=5 << 20, weights=6_265_600, device="CPU x86_64, 2 threads",
        dtype="float32", torch="2.13", repetitions=1, copy_bandwidth=2e10,
        measurements=measurements,
    )  # fmt: skip


def test_on_a_terminal_the_table_has_columns_and_fits_80():
    slow = bench.BenchResult(
        test="tg128 @ d4096", batch=8, seconds=(1.0,), tokens_per_second=1302.19, deviation=10.55,
        bytes_per_step=7e9, bytes_per_token=6821.1e6, distinct_experts=5.25, bandwidth=980.4e9,
        of_bound=0.612, peak_bytes=23 << 30,
    )  # fmt: skip
    prompt = bench.BenchResult(
        test="pp512", batch=1, seconds=(1.0,), tokens_per_second=3.1, deviation=0.0
    )
    subject, _, *table, _, notes = report(prompt, slow).aligned().rstrip().split("\n")
    assert subject == "tiny · 5.00 MiB · 6.266 M · CPU x86_64, 2 threads"
    assert [len(line) for line in table] == [len(table[0])] * 3
    assert len(table[0]) <= 80
    assert "|" not in "".join(table)
    assert table[2].startswith("tg128 @ d4096 b8  1302.19 ± 10.55")
    assert "1 repetition;" in notes
    assert "GB/s  MB/token" not in report(prompt).aligned()
    assert report(prompt).markdown().startswith("| model | size |")


def test_a_bar_goes_by_repetitions():
    model, told = small_model(), []
    tests = [BenchTest(kind="pp", tokens=8), BenchTest(kind="tg", tokens=2, batch=2)]
    bench.run_bench(model, tests, name="small", repetitions=2, progress=lambda *at: told.append(at))
    assert [what for what, _, _ in told][::2] == ["pp8, batch 1"] * 3 + ["tg2, batch 2"] * 3
    shares = [done / total for _, done, total in told]
    assert len(shares) == 12
    assert shares[-1] == pytest.approx(1)
