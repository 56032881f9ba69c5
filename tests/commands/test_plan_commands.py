"""qmix plan as a user meets it."""

import json
import shutil

import pytest

from qmix.commands import plan_text
from qmix.commands.plan_served import served_plan
from qmix.commands.planner import PlanRequest, answer
from qmix.planning import machine
from qmix.planning.machine import HostMemory, Measured
from tests.support.process import CARD, GIB, qmix


@pytest.fixture
def full(tmp_path):
    """The 8x7B's config.json."""
    path = tmp_path / "Mixtral-8x7B" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"model_type": "mixtral", "max_position_embeddings": 32768}))
    return path


@pytest.mark.parametrize(("bits", "whole"), [(2.65, True), (2.7, False), (4.25, False)])
def test_the_8x7b_fits_16_gib_whole_where_few_bits_are_asked(full, here, bits, whole):
    request = PlanRequest(source=full, method="auto", bits=bits, ram="16G")
    found = answer(request)
    model = found.estimate.plan.model
    assert bits - 0.01 < model.bits_per_weight <= bits
    average = f"integers of {model.bits_per_weight:.3g} bits on average"
    assert model.assumption == (average if bits < 4 else "int4 g64")
    assert ("all 256 experts in host memory" in plan_text.text(found)) == whole
    *_, method = found.estimate.quantization
    assert method.method == ("auto" if bits < 4 else "gptq")
    assert method.bytes_out == model.file_bytes


@pytest.mark.parametrize(
    ("bits", "vram", "context", "whole"),
    [
        (3.5, "24G", 8192, True),
        (3.7, "24G", 8192, True),
        (4.25, "24G", 8192, False),
        (2.5, "16G", 2048, True),
        (2.65, "16G", 2048, False),
    ],
)
def test_few_bits_are_as_few_on_a_gpu(full, here, bits, vram, context, whole):
    request = PlanRequest(
        source=full, method="auto", bits=bits, vram=vram, ram="64G", context=context
    )
    found = answer(request).estimate.plan
    assert found.resident == whole
    assert found.widened_bytes == 0
    assert found.slots > 150


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A desktop without a GPU that nobody measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "memory", lambda: HostMemory(total=32 * GIB, available=30 * GIB))
    monkeypatch.setattr(machine, "gpus", lambda: ())
    return monkeypatch


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["/nowhere"], 3, "/nowhere: no such directory or file"),
        (["docs"], 3, "neither a checkpoint nor a config.json"),
        (["README.md"], 3, "not valid JSON"),
        (["evals/tiny", "--vram", "24Q"], 2, "--vram: not a size"),
        (["evals/tiny", "--ram", "0"], 2, "--ram: a size out of range"),
        (["evals/tiny", "--vram", "1M"], 4, "vram: too little device memory"),
        (["evals/tiny", "--ram", "100M"], 4, "ram: too little host memory"),
        (["evals/tiny", "--card", "abacus"], 2, "--card: unknown GPU"),
        (["evals/tiny", "--ctx", "100000"], 2, "context: out of range"),
        (["evals/tiny", "--batch", "0"], 2, "batch: out of range"),
        (["evals/tiny", "--kv", "int8", "--for", "vllm"], 2, "--kv is for qmix itself"),
        (["evals/tiny", "--group-size", "64"], 2, "--group-size does not apply"),
        (["evals/tiny", "--method", "gptq", "--group-size", "5"], 2, "no such group size"),
        (["evals/tiny", "--bits", "3"], 2, "--bits does not apply to --method nf4"),
        (["evals/tiny", "--method", "auto", "--bits", "nan"], 2, "--bits: out of range"),
    ],
)
def test_bad_input_gets_one_line_and_its_exit_code(arguments, code, words):
    result = qmix("plan", *arguments)
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_a_damaged_checkpoint_is_refused(tiny_nf4, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_nf4, folder)
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-5])
    result = qmix("plan", folder)
    assert result.returncode == 3
    assert shard.name in result.stderr


def test_too_small_a_card_exits_4_and_names_what_would_fit(full):
    result = qmix("plan", full, "--vram", "1G")
    assert result.returncode == 4
    assert "What would fit: --vram 4.9G" in result.stderr


def test_an_absurd_config_is_refused_at_once(full):
    full.write_text(json.dumps({"num_hidden_layers": 1024, "num_local_experts": 1024}))
    result = qmix("plan", full)
    assert result.returncode == 3
    assert "too many weights" in result.stderr


def test_json_and_text_say_the_same(full):
    arguments = ("plan", full, "--vram", "16G", "--ram", "32G", "--ctx", "8192")
    text = qmix(*arguments)
    document = json.loads(qmix(*arguments, "--json").stdout)
    assert text.returncode == 0
    assert text.stderr == ""
    experts = document["experts"]
    assert experts["device"] + 0 < experts["all"] == 256
    assert f"{experts['device']} of 256 in device memory" in text.stdout
    assert document["device_bytes"] == sum(document["device"].values()) <= 16 * GIB
    assert document["assumed"] == "nf4 b64 double-quant"
    assert "assumed" in text.stdout
    assert {speed["path"] for speed in document["speeds"]} == {"interconnect", "cpu"}
    assert all(rate["source"] for rate in document["rates"].values())


def test_a_folder_with_a_config_alone_will_do(full):
    assert qmix("plan", full.parent, "--card", "h100").returncode == 0


def test_a_quantized_checkpoint_is_planned_as_it_is(tiny_nf4):
    document = json.loads(qmix("plan", tiny_nf4, "--ram", "2G", "--json").stdout)
    assert document["assumed"] is None
    assert document["quantization"] == []
    assert document["resident"]


def test_a_dense_one_for_its_quantization(tiny):
    document = json.loads(qmix("plan", tiny, "--ram", "2G", "--method", "gptq", "--json").stdout)
    assert document["assumed"] == "int4 g128"
    assert [one["method"] for one in document["quantization"]] == ["rtn", "gptq"]


def test_without_a_gpu_the_machines_free_memory_is_planned_for(here, full):
    found = answer(PlanRequest(source=full))
    assert not found.estimate.plan.gpu
    assert found.estimate.plan.ram == 30 * GIB
    assert "assumed" in found.estimate.rates.host.source


def test_a_gpu_is_planned_for_where_there_is_one(here, full):
    here.setattr(machine, "gpus", lambda: (CARD,))
    found = answer(PlanRequest(source=full))
    assert (found.estimate.plan.vram, found.estimate.plan.ram) == (23 * GIB, 30 * GIB)
    assert "RTX 3090" in found.place
    assert "RTX 3090" in found.estimate.rates.device.source


def test_a_budget_on_this_card_is_not_another_card(here, full):
    here.setattr(machine, "gpus", lambda: (CARD,))
    mine = answer(PlanRequest(source=full, vram="16G"))
    assert "RTX 3090, 16.00 GiB" in mine.place
    assert mine.estimate.plan.ram == 30 * GIB
    other = answer(PlanRequest(source=full, vram="40G"))
    assert "A100-40" in other.place
    assert other.estimate.plan.ram is None


def test_a_named_card_is_planned_for_without_asking_for_this_machines(here, full):
    here.setattr(machine, "gpus", lambda: pytest.fail("nvidia-smi was asked"))
    assert "A100-80" in answer(PlanRequest(source=full, card="a100-80")).place


def test_measurements_of_this_machine_are_taken_and_another_cards_are_not(here, full):
    here.setattr(machine, "gpus", lambda: (CARD,))
    machine.save(
        Measured(
            key=machine.key(CARD.name),
            host_read=41e9,
            disk_read=3e9,
            device_copy=840e9,
            interconnect=24e9,
            date="2026-01-02T03:04:05+00:00",
        )
    )
    rates = answer(PlanRequest(source=full)).estimate.rates
    assert [r.bandwidth for r in (rates.host, rates.disk, rates.device, rates.interconnect)] == [
        41e9, 3e9, 840e9, 24e9,
    ]  # fmt: skip
    assert rates.interconnect.source == "measured here on 2026-01-02"
    other = answer(PlanRequest(source=full, card="a100-80")).estimate.rates
    assert "A100-80" in other.device.source
    assert "assumed" in other.host.source


def test_a_damaged_file_of_measurements_is_noted(here, full):
    path = machine.measurements_path()
    path.parent.mkdir(parents=True)
    path.write_text("no JSON")
    found = answer(PlanRequest(source=full))
    assert str(path) in plan_text.text(found)


def test_a_gpu_without_the_kernels_is_noted(here, full):
    assert "compute capability" in plan_text.text(answer(PlanRequest(source=full, card="T4")))
    assert "compute capability" not in plan_text.text(answer(PlanRequest(source=full, card="L4")))


@pytest.mark.parametrize("size", ["8G", "12G", "16G", "20G", "24G", "40G", "80G"])
def test_every_usual_card_gets_an_answer_that_fits_the_screen(here, full, size):
    text = plan_text.text(answer(PlanRequest(source=full, vram=size, ram="64G")))
    assert text.startswith("Mixtral-8x7B: 32 layers of 8 experts")
    assert "e+" not in text
    assert len(text.splitlines()) < 45


def test_for_another_server_on_several_gpus(full):
    arguments = ("plan", full, "--for", "vllm", "--tp", "2", "--ctx", "32768")
    said, document = (
        qmix(*arguments, "--card", "4090"),
        json.loads(qmix(*arguments, "--json").stdout),
    )
    assert said.returncode == 0
    assert "for vLLM 0.33 on 2 GPUs, context 32768, batch 1" in said.stdout
    assert "serve     vllm serve FOLDER --tensor-parallel-size 2" in said.stdout
    assert document["assumed"] == "int4 g128"
    assert document["each_gpu_bytes"] == sum(document["each_gpu"].values())
    held = document["gpus_that_hold_it"]
    assert (held["RTX 4090"], held["H200"]) == (2, 1)
    assert "T4" not in held


def test_for_another_server_what_does_not_fit_or_is_not_loaded_is_said(full, tiny_nf4):
    small = qmix("plan", full, "--for", "sglang", "--card", "3060")
    assert small.returncode == 4
    assert "These hold it: 4 x RTX 3060" in small.stderr
    noted = served_plan(PlanRequest(source=tiny_nf4), "vllm", 1).note
    assert "vLLM 0.33 would not load this folder (bitsandbytes" in noted
    for wrong in (
        ("--tp", "2"),
        ("--for", "vllm", "--plot", "x.svg"),
        ("--for", "vllm", "--ram", "1G"),
    ):
        assert qmix("plan", full, *wrong).returncode == 2


def test_a_cache_in_8_bits_is_told_with_its_price(full, here):
    eight = answer(PlanRequest(source=full, card="3090", ram="64G", context=32768, kv="int8"))
    text = plan_text.text(eight)
    assert "KV cache                     2.06 GiB" in text
    assert "8 bits take 1.94 GiB less than 16; KL 0.0008 nats a token on the tiny model" in text
    plain = plan_text.text(answer(PlanRequest(source=full, card="3090", context=32768)))
    assert "8 bits take" not in plain
    assert "--kv int8" in plain
