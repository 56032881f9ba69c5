"""Models whose experts do not all fit: equal bits whatever fits, exact bytes, clear refusals."""

import copy
import gc
import json
import shutil
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qmix import kernels
from qmix.errors import CheckpointError, ResourceError, UnsupportedError, UsageError
from qmix.evals import offload as offload_record
from qmix.evals.timing import bench
from qmix.experts.disk_store import DiskStore
from qmix.experts.layer_experts import ResidentExperts
from qmix.experts.policy import PRESETS
from qmix.formats import open_checkpoint
from qmix.formats.files import shards
from qmix.generation.config import GenerationConfig
from qmix.models import load
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.offload import Tiers
from qmix.planning import machine, plan
from qmix.text.tokenizer import LlamaTokenizer
from qmix.weights.blob import PAGE_BYTES, aligned
from qmix.weights.scheme import Scheme
from tests.support.models import TINY, load_in_tiers, quantized, small_model
from tests.support.packers import write
from tests.support.process import qmix, session_of
from tests.support.soak import examples

PROMPT = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 2, 3, 4, 5, 6, 7, 8, 21, 22, 23, 24]])
EXPERTS = 3 * 8  # of the dense and NF4 ones
STEPS = PROMPT[:, :3]  # short enough to be a decode step of three tokens
LAYOUTS = ["dense", "nf4", "nf4 plain", "gptq", "gptq act-order", "gptq mixed", "awq", "compressed"]


def written(folder, layout):
    """A small checkpoint of three layers in a layout; its number of experts."""
    if layout in ("dense", "nf4", "nf4 plain"):
        small_model().to(torch.bfloat16).save_pretrained(
            folder / "dense" if layout != "dense" else folder
        )
        if layout != "dense":
            scheme = Scheme(kind="nf4", double_quant=layout == "nf4")
            return quantized(folder / "dense", folder / "out", scheme)
    else:
        write(folder, layout)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories by layout."""
    return {name: written(tmp_path_factory.mktemp("layout"), name) for name in LAYOUTS}


def offloaded(directory, host, name="heat"):
    tiers = Tiers(device=0, host=host, settings=PRESETS[name])
    return load_in_tiers(directory, "cpu", tiers=tiers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_that_slots_cannot_hold_stay_on_the_host(saved, layout):
    """Their matrices are too small for a panel, which a GPU's slots hold; the CPU stands for it."""
    resident = MixtralForCausalLM.from_pretrained(saved[layout], device="cpu")
    with torch.no_grad():
        expected = resident(PROMPT).logits
    with pytest.warns(UserWarning, match="experts stay in host memory, and the CPU multiplies"):
        model = load_in_tiers(saved[layout], "cpu", tiers=Tiers(device=4, host=5))
    with torch.no_grad():
        assert torch.equal(model(PROMPT).logits, expected)
    assert isinstance(model.model.experts_store, DiskStore)


def greedy(model, prompt=PROMPT, count=12):
    """Ids and the logits of every step."""
    with torch.no_grad():
        out = model.generate(
            prompt, max_new_tokens=count, output_logits=True, return_dict_in_generate=True
        )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_equal_bits_whatever_fits(saved, layout):
    model = MixtralForCausalLM.from_pretrained(saved[layout], device="cpu")
    total = model.config.num_local_experts * model.config.num_hidden_layers
    expected = [greedy(model, prompt) for prompt in (PROMPT, STEPS)]
    for host in (2, 5, total):
        model = offloaded(saved[layout], host)
        for _ in range(2):  # the second time with what the first left
            for prompt, (ids, logits) in zip((PROMPT, STEPS), expected, strict=True):
                found, again = greedy(model, prompt)
                assert torch.equal(found, ids)
                assert torch.equal(again, logits)


@examples(2)
@given(
    host=st.integers(2, EXPERTS),
    name=st.sampled_from(sorted(PRESETS)),
    rows=st.integers(1, 3),
    length=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_neither_slots_nor_policy_nor_batch_change_a_bit(saved, host, name, rows, length, seed):
    """Rows that choose more experts than there are slots among them."""
    prompt = torch.randint(1, 100, (rows, length), generator=torch.Generator().manual_seed(seed))
    plain = MixtralForCausalLM.from_pretrained(saved["nf4"], device="cpu")
    ids, logits = greedy(plain, prompt, 5)
    found, again = greedy(offloaded(saved["nf4"], host, name), prompt, 5)
    assert torch.equal(found, ids)
    assert torch.equal(again, logits)


def test_every_byte_from_the_disk_is_counted(saved, monkeypatch):
    read = []
    plain = shards._read_into
    monkeypatch.setattr(
        shards, "_read_into", lambda n, e, view: read.append(e.nbytes) or plain(n, e, view)
    )
    model = offloaded(saved["nf4"], 6)
    store = model.store
    store.looks_ahead = False
    del read[:]
    greedy(model, PROMPT, 1)
    before = store.statistics()
    assert before.prefill_disk_bytes == sum(read)
    assert len(read) == (EXPERTS - 6) * 3 * 6  # codes, scales, two tables, nested scales, state
    assert (before.tokens, before.disk_bytes, before.hits + before.misses) == (0, 0, 0)
    del read[:]
    cache = model.new_cache(1)
    for token in range(9):
        with torch.no_grad():
            model.next_logits(torch.tensor([[token + 1]]), cache)
    after = store.statistics().since(before)
    assert after.tokens == 9
    assert after.hits + after.misses == 9 * 3 * 2
    assert after.disk_bytes == sum(read)
    assert len(read) == store.residency.counts.fetches * 3 * 6
    assert after.misses == store.residency.counts.fetches
    assert 0 < after.hit_rate < 1
    assert after.prefill_disk_bytes == 0
    assert f"{after.disk_bytes / 9 / 1e9:.2f} GB/token from disk" in str(after)
    assert after.to_dict()["disk_bytes_per_token"] == after.disk_bytes / 9


def test_a_prompt_leaves_slots_and_heat_as_they_were(saved):
    model = offloaded(saved["nf4"], 9)
    greedy(model, STEPS, 4)
    residency = model.store.residency
    model.store.end_token()
    before = (list(residency.slot_of_id), list(residency.policy.heat), residency.counts.tokens)
    with torch.no_grad():
        model(PROMPT)
    model.store.end_token()
    assert (residency.slot_of_id, residency.policy.heat, residency.counts.tokens) == before


def test_resident_weights_are_views_into_the_arena(saved):
    for layout in ("nf4", "compressed", "gptq", "dense"):
        store = offloaded(saved[layout], 4).store
        for slot, held in enumerate(store._in_slots):
            blob = store.arena.blob(slot)
            start = blob.data_ptr()
            for weight in (held.w1, held.w2, held.w3):
                codes = weight.data if layout == "dense" else weight.codes
                assert start <= codes.data_ptr() < start + len(blob)
                assert codes.data_ptr() % 64 == 0


def test_a_file_that_is_damaged_meanwhile_is_named_and_can_be_mended(saved, tmp_path):
    folder = shutil.copytree(saved["nf4"], tmp_path / "model")
    expected = greedy(MixtralForCausalLM.from_pretrained(folder, device="cpu"), STEPS, 5)
    model = offloaded(folder, 2)
    file = next(folder.glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(
        CheckpointError, match=r"experts.*ends early.*safetensors|safetensors.*experts.*ends early"
    ):
        greedy(model, STEPS, 5)
    assert model.store.statistics().failures > 0
    file.write_bytes(whole)
    found = greedy(model, STEPS, 5)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("prompt", [STEPS, PROMPT], ids=["step", "prompt"])
def test_an_interruption_between_products_costs_nothing(saved, monkeypatch, prompt):
    expected = greedy(MixtralForCausalLM.from_pretrained(saved["nf4"], device="cpu"), prompt, 4)
    model = offloaded(saved["nf4"], 3)
    count = []

    def interrupted(plain):
        def product(*given):
            count.append(1)
            if len(count) % 13 == 0:
                raise KeyboardInterrupt
            return plain(*given)

        return product

    with monkeypatch.context() as patch:
        for name in ("linears", "_add_experts"):
            patch.setattr(kernels, name, interrupted(getattr(kernels, name)))
        for _ in range(4):
            with pytest.raises(KeyboardInterrupt):
                greedy(model, prompt, 4)
    assert torch.equal(greedy(model, prompt, 4)[1], expected[1])


def test_too_little_for_one_token_is_refused(saved):
    with pytest.raises(ResourceError, match="too little host memory for one token's experts"):
        offloaded(saved["nf4"], 1)


def test_gradients_are_refused_and_parameters_frozen(saved):
    model = offloaded(saved["nf4"], 4)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model(STEPS).logits.requires_grad
    x = model.model.embed(STEPS).detach().requires_grad_()
    with pytest.raises(UsageError, match="no gradients"):
        model(inputs_embeds=x)


def test_it_stays_on_its_device_and_takes_another_dtype(saved):
    model = offloaded(saved["nf4"], 4)
    assert model.to("cpu") is model
    with pytest.raises(UsageError, match="an offloaded model cannot be moved"):
        model.to("meta")
    assert model.device.type == "cpu"
    expected = MixtralForCausalLM.from_pretrained(saved["nf4"], device="cpu").float()
    assert torch.equal(greedy(model.float())[1], greedy(expected)[1])
    with pytest.raises(UnsupportedError, match="cannot be copied or pickled"):
        copy.deepcopy(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saving_writes_what_the_whole_model_writes(saved, tmp_path, layout):
    MixtralForCausalLM.from_pretrained(saved[layout], device="cpu").save_pretrained(tmp_path / "a")
    offloaded(saved[layout], 3).save_pretrained(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_oracle_reads_every_expert(saved):
    plain = MixtralForCausalLM.from_pretrained(saved["nf4"], device="cpu")
    with kernels.override("reference"), torch.no_grad():
        expected = plain(STEPS).logits
        assert torch.equal(offloaded(saved["nf4"], 3)(STEPS).logits, expected)


def test_without_a_budget_there_is_no_store(saved):
    model = MixtralForCausalLM.from_pretrained(saved["nf4"], device="cpu")
    assert model.store is None
    assert isinstance(model.model.layers[0].block_sparse_moe.stored, ResidentExperts)
    assert any(p.requires_grad for p in model.parameters())


def test_a_reply_and_a_benchmark_say_what_the_store_did(saved):
    model = offloaded(saved["nf4"], 5)
    report = bench.run_bench(
        model, bench.parse_tests("0", "4", "0", "1"), name="small", repetitions=2
    )
    did = report.measurements[0].experts
    assert did.tokens == 2 * 4  # the prompt is one token, and so a step
    assert did.disk_bytes > 0
    assert f"tg4: {did}" in report.markdown()
    document = report.to_dict()["measurements"][0]["experts"]
    assert document["hit_rate"] == did.hit_rate


def test_chat_says_what_the_store_did(tiny_nf4):
    session = session_of(
        offloaded(tiny_nf4, 5),
        LlamaTokenizer.from_pretrained(TINY),
        GenerationConfig(max_new_tokens=4),
    )
    list(session.reply(session.prepare("Hello")))
    first = session.stats.experts
    assert first.tokens <= 4
    assert "from disk" in str(first)
    list(session.reply(session.prepare("More")))
    assert session.stats.experts.tokens <= 4


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qmix"


def least(directory, blobs, **options):
    """A budget for so many experts on the host, two buffers and all the rest; and its plan."""
    metadata = open_checkpoint(directory).metadata
    options = {"dtype": "float32", **options}
    breakdown = plan.plan(metadata, gpu=False, **options).host_memory
    beside = breakdown.total - breakdown["experts"]
    for ram in range(beside, breakdown.total, 256):
        with suppress(ResourceError):
            planned = plan.plan(metadata, gpu=False, ram=ram, **options)
            if planned.host == blobs:
                return ram, planned
    raise AssertionError("no budget gives so many")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_budget_is_planned_and_kept_to_the_byte(saved, layout, cache):
    ram, planned = least(saved[layout], 2)
    model = MixtralForCausalLM.from_pretrained(
        saved[layout], device="cpu", dtype="float32", ram=ram
    )
    store = model.store
    assert store.statistics().host == planned.host == 2
    assert aligned(store.arena.nbytes, PAGE_BYTES) <= planned.expert_bytes
    expected = MixtralForCausalLM.from_pretrained(saved[layout], device="cpu", dtype="float32")
    assert torch.equal(greedy(model)[1], greedy(expected)[1])


def test_a_budget_that_holds_everything_changes_nothing(saved, cache):
    for ram in ("8GiB", 1 << 33):
        model = MixtralForCausalLM.from_pretrained(saved["nf4"], device="cpu", ram=ram)
        assert model.store is None
    assert not cache.exists()


@pytest.mark.parametrize(
    ("options", "kind", "named"),
    [
        ({"ram": "1MiB"}, ResourceError, "ram: .*expected at least .*found 1.00 MiB"),
        ({"ram": "24Q"}, UsageError, "ram: not a size.*24Q"),
        ({"vram": "8GiB"}, UsageError, "vram: the CPU has no device memory to budget"),
        ({"ram": "8GiB", "max_context": 513}, UsageError, "context"),
    ],
    ids=str,
)
def test_budgets_that_cannot_be_are_refused(saved, options, kind, named):
    with pytest.raises(kind, match=named):
        MixtralForCausalLM.from_pretrained(saved["nf4"], device="cpu", **options)


def test_memory_that_is_not_free_is_refused_before_it_is_taken(saved, monkeypatch):
    monkeypatch.setattr(
        machine, "memory", lambda: machine.HostMemory(total=1 << 30, available=1 << 20)
    )
    monkeypatch.setattr(load, "fill", None)
    with pytest.raises(ResourceError, match="not enough free host memory") as caught:
        MixtralForCausalLM.from_pretrained(saved["nf4"], device="cpu")
    assert caught.value.exit_code == 4


def test_the_next_run_starts_with_what_this_one_used_most(saved, cache):
    ram, _ = least(saved["nf4"], 6)
    model = MixtralForCausalLM.from_pretrained(saved["nf4"], device="cpu", dtype="float32", ram=ram)
    expected = greedy(model, STEPS, 20)
    model.store.end_token()
    order = model.store.residency.policy.order(8)
    assert not cache.exists()
    del model
    gc.collect()
    (file,) = (cache / "heat").glob("*.json")
    again = MixtralForCausalLM.from_pretrained(saved["nf4"], device="cpu", dtype="float32", ram=ram)
    held = set(again.store.residency.id_of_slot)
    assert held == set(order[:6])
    assert torch.equal(greedy(again, STEPS, 20)[1], expected[1])
    file.write_text("{")
    with pytest.warns(UserWarning, match=r"heat.*Starting without it"):
        MixtralForCausalLM.from_pretrained(saved["nf4"], device="cpu", dtype="float32", ram=ram)


@pytest.mark.slow
def test_the_command_takes_a_budget(tiny_nf4, cache):
    plain = qmix("generate", tiny_nf4, "The list", "--max-new-tokens", "8", "--device", "cpu")
    whole = plan.plan(open_checkpoint(tiny_nf4).metadata, gpu=False)
    ram = str(whole.host_memory.total - whole.host_memory["experts"] // 2)
    options = ("--max-new-tokens", "8", "--device", "cpu", "--ram", ram)
    done = qmix("generate", tiny_nf4, "The list", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == plain.stdout
    shown = qmix(
        "bench", tiny_nf4, "-p", "0", "-n", "4", "-r", "1", "--device", "cpu", "--ram", ram
    )
    assert "from disk" in shown.stdout
    refused = qmix("generate", tiny_nf4, "The list", "--device", "cpu", "--ram", "1MiB")
    assert refused.returncode == 4
    assert refused.stderr.count("\n") == 1
    assert "qmix: ram: " in refused.stderr


def test_a_record_says_what_a_run_took(saved, cache, tmp_path, capsys):
    """The peak of this process is not the model's: the test is that it is reported and compared."""
    out = tmp_path / "record.json"
    ram, _ = least(saved["nf4"], 5, dtype="bfloat16", context=8)
    code = offload_record.main(
        [str(saved["nf4"]), "--ram", str(ram), "--new", "4", "--json", str(out)]
    )
    record = json.loads(out.read_text())
    assert record["new_tokens"] == 4
    assert record["peak_host_bytes"] > 50 << 20
    assert code == (0 if record["peak_host_bytes"] <= ram else 5)
    assert ("exceeded its budget" in capsys.readouterr().err) == (code == 5)
    assert record["experts"]["tokens"] == 4  # a prompt of four tokens is a step
