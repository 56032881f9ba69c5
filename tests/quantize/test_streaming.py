"""The quantizer's road: what it writes, what it refuses, what a kill leaves."""

import json
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmix.errors import CheckpointError, ResourceError, UnsupportedError, UsageError
from qmix.formats import open_checkpoint
from qmix.formats.files import manifest, output_dir, shard_writer, shards
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.quantize.streaming import quantize_streaming
from qmix.weights.dense import Dense
from qmix.weights.nf4 import quantize
from qmix.weights.scheme import NF4, Recipe, Scheme
from qmix.weights.table import Table
from tests.support.models import small_model
from tests.support.process import PATIENCE, python, started


@pytest.fixture
def source(tmp_path):
    """A bf16 checkpoint of two shards with a tokenizer file and a stray README."""
    folder = tmp_path / "source"
    model = small_model().to(torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(b"tokenizer")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "README.md").write_text("of the source")
    return folder


def run(source, out, *, attention=True, **options):
    return quantize_streaming(
        source, out, Recipe.uniform(NF4, attention=attention), method="nf4", **options
    )


def test_experts_and_attention_are_4_bit_and_the_rest_stays_16_bit(source, tmp_path):
    run(source, tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    for tensor in checkpoint.tensors:
        if tensor.linear:
            weight = checkpoint.weight(tensor)
            packed = tensor.kind in ("expert", "attention")
            assert isinstance(weight, Table if packed else Dense), tensor.name
        if tensor.kind in ("router", "head", "embedding", "norm"):
            assert checkpoint.entry(tensor.name).dtype == torch.bfloat16


def test_attention_can_be_left_dense_and_the_config_says_so(source, tmp_path):
    run(source, tmp_path / "out", attention=False)
    checkpoint = open_checkpoint(tmp_path / "out")
    kinds = {t.kind: type(checkpoint.weight(t)) for t in checkpoint.tensors if t.linear}
    assert kinds["attention"] is Dense
    assert kinds["expert"] is Table
    assert "q_proj" in checkpoint.config.quantization_config["llm_int8_skip_modules"]


def test_the_weights_are_what_quantizing_each_alone_gives(source, tmp_path):
    run(source, tmp_path / "out")
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    for tensor in after.tensors:
        if tensor.kind in ("expert", "attention"):
            alone = quantize(before.read(tensor.name), NF4)
            assert torch.equal(after.weight(tensor).dequantize(), alone.dequantize())
        else:
            assert torch.equal(after.read(tensor.name), before.read(tensor.name))


def test_config_tokenizer_and_manifest_come_with_it(source, tmp_path):
    import hashlib

    run(source, tmp_path / "out")
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (out / "tokenizer.model").read_bytes() == b"tokenizer"
    assert (out / "generation_config.json").is_file()
    listed = json.loads((out / manifest.MANIFEST).read_text())
    present = {path.name for path in out.iterdir()} - {manifest.MANIFEST, manifest.REPORT}
    assert listed["files"].keys() == present
    for name, facts in listed["files"].items():
        data = (out / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_two_runs_write_the_same_bytes(source, tmp_path):
    run(source, tmp_path / "a")
    run(source, tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        if path.name == manifest.REPORT:  # holds seconds
            continue
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_the_4_bit_model_loads_generates_and_saves_again_bit_for_bit(source, tmp_path):
    run(source, tmp_path / "out")
    model = MixtralForCausalLM.from_pretrained(tmp_path / "out", device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    text = model.generate(ids, max_new_tokens=8)
    model.save_pretrained(tmp_path / "again")
    again = MixtralForCausalLM.from_pretrained(tmp_path / "again", device="cpu")
    assert torch.equal(again.generate(ids, max_new_tokens=8), text)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_shards_are_bounded(source, tmp_path):
    run(source, tmp_path / "out", shard_bytes=100_000)
    sizes = [p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) < 100_000 + 40_000  # the header comes on top


def test_the_report_adds_up(source, tmp_path):
    report = run(source, tmp_path / "out")
    assert report.parameters == sum(p.numel() for p in small_model().parameters())
    by_kind = {kind.kind: kind for kind in report.kinds()}
    assert by_kind["expert"].tensors == 3 * 8 * 3
    assert 4.1 < by_kind["expert"].bits_per_weight < 6.5  # tiny matrices pay for their constants
    assert 0.08 < by_kind["expert"].relative_error < 0.11
    assert by_kind["router"].relative_error == 0
    json.dumps(report.to_dict())


def test_float32_sources_become_16_bit(tmp_path):
    small_model().save_pretrained(tmp_path / "source")
    run(tmp_path / "source", tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert {entry.dtype for entry in checkpoint.shards.entries.values()} <= {
        torch.bfloat16, torch.uint8, torch.float32,
    }  # fmt: skip
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.read("lm_head.weight").dtype == torch.bfloat16


def test_without_double_quant_the_scales_are_float32(source, tmp_path):
    recipe = Recipe.uniform(Scheme(kind="nf4", double_quant=False), attention=True)
    quantize_streaming(source, tmp_path / "out", recipe, method="nf4")
    entries = open_checkpoint(tmp_path / "out").shards.entries
    absmax = [e for name, e in entries.items() if name.endswith(".absmax")]
    assert {entry.dtype for entry in absmax} == {torch.float32}
    assert not any("nested" in name for name in entries)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.layers.2.block_sparse_moe.experts.1.w3.weight"]
)
def test_weights_that_are_not_finite_are_refused_and_nothing_is_left(source, tmp_path, name, bad):
    path = next(source.glob("*.safetensors"))
    tensors = load_file(path)
    tensors[name][1, 2] = bad
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=name):
        run(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_quantized_source_is_refused(source, tmp_path):
    run(source, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="quantized already"):
        run(tmp_path / "out", tmp_path / "twice")


def test_an_existing_output_is_refused_without_force_and_replaced_with_it(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    before = (out / manifest.MANIFEST).read_bytes()
    with pytest.raises(UsageError, match="OUT exists"):
        run(source, out)
    run(source, out, force=True)
    assert (out / manifest.MANIFEST).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_force_replaces_checkpoints_only(source, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"did not write.*thesis\.tex"):
        run(source, home, force=True)
    assert (home / "thesis.tex").is_file()
    run(source, tmp_path / "out")
    (tmp_path / "out" / "notes.odt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.odt"):
        run(source, tmp_path / "out", force=True)


def test_a_failed_forced_run_keeps_the_old_output(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    path = next(source.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(CheckpointError):
        run(source, out, force=True)
    assert open_checkpoint(out).tensors


@pytest.mark.parametrize("where", ["source", "source/inside", ".", "file", "link"])
def test_unfit_outputs_are_refused_before_any_work(source, tmp_path, where):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(source)
    before = sorted(p.name for p in source.iterdir())
    with pytest.raises(UsageError):
        run(source, tmp_path / where, force=True)
    assert sorted(p.name for p in source.iterdir()) == before


def test_a_disk_too_small_is_refused_before_any_work(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="not enough free disk") as caught:
        run(source, tmp_path / "out")
    assert caught.value.exit_code == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_disk_that_fills_up_is_one_error_and_leaves_nothing(source, tmp_path):
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import sys; sys.argv = ["qmix", "quantize", {str(source)!r}, {str(tmp_path / "out")!r}]
from qmix.cli import main; main()
"""
    result = python(code)
    assert result.returncode == 4, result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("qmix: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


# The command line, which says so and waits once it has written eight tensors.
STOPPING = """
import sys, time
from qmix.cli import main
from qmix.formats.files.shard_writer import ShardWriter
write, written = ShardWriter.write, []
def stopping(self, name, tensor):
    write(self, name, tensor)
    written.append(name)
    if len(written) == 8:
        print("in the middle", flush=True)
        time.sleep(600)
ShardWriter.write = stopping
main()
"""


@contextmanager
def in_the_middle(source, out):
    command = [sys.executable, "-c", STOPPING, "quantize", str(source), str(out)]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"in the middle\n", process.stderr.read()
        assert list(out.with_name(out.name + ".partial").glob("*.safetensors"))
        yield process


def test_a_killed_run_leaves_no_output_and_the_next_one_succeeds(source, tmp_path):
    out = tmp_path / "out"
    with in_the_middle(source, out) as process:
        process.kill()
        process.wait(PATIENCE)
    assert not out.exists()
    run(source, out)
    assert open_checkpoint(out).tensors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_ctrl_c_leaves_nothing_and_exits_130(source, tmp_path):
    with in_the_middle(source, tmp_path / "out") as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130, process.stderr.read()
        assert b"Traceback" not in process.stderr.read()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_second_run_on_the_same_output_is_refused_while_the_first_lives(source, tmp_path):
    with output_dir.partial(tmp_path / "out") as folder:
        (folder / "half.safetensors").write_text("written")
        with pytest.raises(CheckpointError, match="another run"):
            run(source, tmp_path / "out")
    assert (tmp_path / "out" / "half.safetensors").is_file()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["half.safetensors"]


def test_the_writer_holds_one_tensor_at_a_time(source, tmp_path, monkeypatch):
    held = []
    original = shards.Shards.read

    def read(self, name, *into):
        held.append(name)
        return original(self, name, *into)

    written = []
    writer = shard_writer.ShardWriter.write

    def write(self, name, tensor):
        written.append(len(held))
        return writer(self, name, tensor)

    monkeypatch.setattr(shards.Shards, "read", read)
    monkeypatch.setattr(shard_writer.ShardWriter, "write", write)
    run(source, tmp_path / "out")
    assert len(held) == len(set(held))
    assert set(written) == set(range(1, len(held) + 1))
