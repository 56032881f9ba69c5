"""A model of the hub becomes a folder: the cache first, one layout only, clear refusals.

The hub is a server on loopback.
"""

import json
import re
from pathlib import Path

import pytest
import torch

import qmix
from qmix.commands.checkpoint.inspect import inspect
from qmix.errors import CheckpointError, QmixError, ResourceError, UnsupportedError, UsageError
from qmix.hub import cache
from qmix.hub.download import fetch
from qmix.hub.remote import HubOptions
from qmix.hub.repo_id import RepoId
from qmix.hub.selection import is_complete
from qmix.hub.source import described, resolve
from tests.support import fake_hub
from tests.support.fake_hub import BIG, COMMIT, Virtual


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_what_another_program_left_half_in_the_cache_is_completed(org_tiny, monkeypatch):
    folder = resolve("org/tiny")
    (folder / "model.safetensors.index.json").unlink()
    assert is_complete(folder, "weights", RepoId("org/tiny")) is False
    resolve("org/tiny")
    assert is_complete(folder, "weights", RepoId("org/tiny"))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with described("org/tiny", part=True) as config_only:  # enough for a plan
        assert config_only == folder
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"), described("org/tiny"):
        pass


def test_one_layout_is_fetched_said_beforehand_and_nothing_is_asked_again(org_tiny, tiny):
    said = []
    folder = resolve("org/tiny", confirm=said.append)
    assert names(folder) == {path.name for path in tiny.iterdir()}
    assert all((folder / name).read_bytes() == (tiny / name).read_bytes() for name in names(folder))
    (download,) = said
    assert re.match(
        r"org/tiny@c0ffee0: 3 files of safetensors, 0\.01 GB \(not the 214\.75 GB of other files\), "
        r"to .*/hub, which has [\d.]+ GB free",
        str(download),
    )
    org_tiny.requests.clear()
    for same in ("org/tiny", "hf://org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"):
        assert resolve(same) == folder
    assert org_tiny.requests == []
    org_tiny.status = 500  # and with no hub at all
    with pytest.raises(ResourceError, match="answers 500"):
        fetch(RepoId("org/tiny"), "model", HubOptions(), newest=True)
    assert resolve("org/tiny", options=HubOptions(local_files_only=True)) == folder


def test_a_refusal_leaves_the_weights_where_they_are(org_tiny):
    def refuse(_):
        raise QmixError("no")

    with pytest.raises(QmixError, match="no"):
        resolve("org/tiny", confirm=refuse)
    assert not any("safetensors" in each and "blobs" in each for each in org_tiny.requests)
    with pytest.raises(CheckpointError, match=r"neither a folder here.*qmix pull org/tiny"):
        resolve("org/tiny", options=HubOptions(local_files_only=True))


def test_a_tokenizer_or_config_alone_needs_no_weights(org_tiny):
    resolve("org/tiny", need="config")
    resolve("org/tiny", need="tokenizer")
    assert org_tiny.sent < 400_000
    assert resolve("org/tiny").is_dir()  # and what was half there is completed
    assert org_tiny.sent > 12_000_000


def test_every_class_of_the_api_takes_a_name(org_tiny, tiny):
    org_tiny.gated.add("org/tiny")
    name, token = "org/tiny", {"token": "hf_good"}
    assert qmix.MixtralConfig.from_pretrained(name, **token).num_hidden_layers == 3
    tokenizer = qmix.AutoTokenizer.from_pretrained(name, revision="main", **token)
    assert tokenizer.encode("def f(") == qmix.AutoTokenizer.from_pretrained(tiny).encode("def f(")
    assert org_tiny.sent < 400_000
    with pytest.raises(UnsupportedError, match="gated"):
        qmix.MixtralForCausalLM.from_pretrained(name, device="cpu")
    model = qmix.AutoModelForCausalLM.from_pretrained(name, device="cpu", use_auth_token="hf_good")
    loaded, _ = qmix.load(name, revision=COMMIT, local_files_only=True, device="cpu")
    assert torch.equal(model.lm_head.weight, loaded.lm_head.weight)
    with pytest.raises(UsageError, match="no option 'revison'"):
        qmix.load(name, revison="main", device="cpu")


def test_headers_alone_describe_a_model(org_tiny, tiny):
    with described("org/tiny") as folder:
        assert inspect(folder).to_dict()["parts"] == inspect(tiny).to_dict()["parts"]
        assert inspect(folder).files == inspect(tiny).files
        assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 1_000_000
    assert not folder.exists()
    assert org_tiny.sent < 500_000
    org_tiny.ranges = False  # a server that knows none sends the whole file; we stop reading
    with described("org/tiny") as folder:
        assert inspect(folder).files == inspect(tiny).files


def test_the_real_8x7b_is_planned_from_under_five_megabytes(hub):
    files = fake_hub.mixtral_8x7b()
    hub.add("org/mixtral-8x7b", None, **files)
    with described("org/mixtral-8x7b") as folder:
        inventory = inspect(folder)
    assert inventory.parameters == 46_702_792_704
    assert round(sum(inventory.files.values()) / 1e9, 1) == 93.4
    assert len(inventory.files) == 19
    assert hub.sent < 5_000_000


def test_a_connection_that_is_cut_goes_on_where_it_ended(org_tiny, tiny, monkeypatch):
    # what is kept of a cut answer are whole chunks, of 10 MB each
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    name = "model-00001-of-00003.safetensors"
    org_tiny.cut[name] = 1_000_000
    folder = resolve("org/tiny")
    assert (folder / name).read_bytes() == (tiny / name).read_bytes()
    assert org_tiny.sent < sum(path.stat().st_size for path in tiny.iterdir()) + 100_000


def test_gguf_repositories_need_one_model_named(hub):
    hub.add(
        "org/tiny-GGUF", None, **{f"tiny.{q}.gguf": b"GGUF" for q in ("Q4_K_M", "Q4_K_S", "Q8_0")}
    )
    with pytest.raises(
        CheckpointError, match=r"several GGUF models.*tiny\.Q4_K_M\.gguf \(0\.0 GB\)"
    ):
        resolve("org/tiny-GGUF")
    for name in ("org/tiny-GGUF:q4_k_m", "org/tiny-GGUF/tiny.Q4_K_M.gguf"):
        assert resolve(name).name == "tiny.Q4_K_M.gguf"
    with pytest.raises(CheckpointError, match="no such GGUF model"):
        resolve("org/tiny-GGUF:Q2_K")
    assert resolve("org/tiny-GGUF:Q8_0", options=HubOptions()).name == "tiny.Q8_0.gguf"


def test_headers_alone_describe_a_gguf_model_in_shards(hub, tmp_path):
    from tests.support.gguf_files import write_shards
    from tests.support.models import small_model

    folder = tmp_path / "gguf"
    folder.mkdir()
    first, second = write_shards(folder, small_model(), 2)
    hub.add("org/x-GGUF", folder, **{"other.Q2_K.gguf": BIG})
    with described(f"org/x-GGUF/{first.name}") as path:
        assert path.name == first.name
        assert inspect(path).to_dict()["parts"] == inspect(first).to_dict()["parts"]
    assert resolve(f"org/x-GGUF/{first.name}").with_name(second.name).exists()


@pytest.mark.parametrize(
    ("files", "kind", "message"),
    [
        (["pytorch_model.bin"], UnsupportedError, "no safetensors files.*never unpickles"),
        (["consolidated.00.pth"], UnsupportedError, "Mistral's own.*qmix convert org/other OUT"),
        (["adapter_config.json", "adapter_model.safetensors"], CheckpointError, "LoRA"),
        ([], CheckpointError, "without weights"),
    ],
)
def test_what_is_not_read_is_said_before_a_download(hub, files, kind, message):
    hub.add("org/other", None, **{"README.md": b"x"}, **dict.fromkeys(files, BIG))
    with pytest.raises(kind, match=message):
        resolve("org/other")
    assert hub.sent < 10_000


def test_mistrals_own_files_are_fetched_to_be_converted(hub):
    files = {"consolidated.00.pth": b"x", "params.json": b"{}", "tokenizer.model": b"x"}
    hub.add("org/raw", None, **files)
    assert names(resolve("org/raw", need="raw")) == set(files)


def test_every_refusal_of_the_hub_has_its_remedy(hub, tiny, tmp_path, monkeypatch):
    hub.add("org/tiny", tiny)

    def refused(name, kind, message, **options):
        with pytest.raises(kind, match=message):
            resolve(name, options=HubOptions(**options))

    refused("org/none", CheckpointError, "neither a folder here nor a repository.*spelling")
    refused("org/tiny", CheckpointError, r"no such revision.*/tree/main", revision="v9")
    hub.gated.add("org/tiny")
    refused("org/tiny", UnsupportedError, r"gated.*Accept its terms at http.*hf auth login")
    assert resolve("org/tiny", need="config", options=HubOptions(token="hf_good")).is_dir()
    for status, kind, message in (
        (429, ResourceError, r"no more requests.*again in 7 s"),
        (403, UnsupportedError, "refuses access.*token"),
        (503, ResourceError, "answers 503"),
    ):
        hub.status = status
        refused("org/more", kind, message)
    hub.status = None
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused("org/more", CheckpointError, "cannot be reached.*HTTPS_PROXY")
    monkeypatch.undo()


def test_a_disk_that_is_too_small_is_said_before(hub, tiny):
    hub.add("org/huge", tiny, **{"model-00001-of-00003.safetensors": Virtual(b"", 1 << 50)})
    with pytest.raises(ResourceError, match=r"not enough free disk.*HF_HOME.*--discard-source"):
        resolve("org/huge")


def test_an_index_that_lists_what_is_not_there_is_refused(hub, tiny):
    index = {"weight_map": {"a": "model-00001-of-00003.safetensors", "b": "../../x.safetensors"}}
    hub.add("org/tiny", tiny, **{"model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(CheckpointError, match=r"does not hold.*x\.safetensors"):
        resolve("org/tiny")


@pytest.mark.parametrize("name", ["../../x.gguf", "/tmp/x.gguf", "..\\x.gguf", "a/../../x.gguf"])
def test_a_hub_cannot_name_files_outside_the_folder(hub, name):
    hub.add("org/evil", None, **{name: b"GGUF"})
    for ask in (lambda: resolve("org/evil"), lambda: described("org/evil").__enter__()):
        with pytest.raises(CheckpointError, match="without weights"):
            ask()


def test_a_snapshot_is_removed_with_its_blobs(org_tiny):
    folder = resolve("org/tiny")
    (model,) = cache.models(HubOptions())
    assert (str(model), model.folder) == ("org/tiny", folder)
    with pytest.raises(CheckpointError, match=r"not in the hub's cache.*found org/tiny"):
        cache.removal_of(RepoId("org/none"), HubOptions())
    removal = cache.removal_of(RepoId("org/tiny"), HubOptions())
    assert removal.freed_bytes > 12_000_000
    removal.run(HubOptions())
    assert cache.models(HubOptions()) == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", RepoId("org/name")),
        ("org/name@v1.0", RepoId("org/name", "v1.0")),
        ("org/name@refs/pr/3", RepoId("org/name", "refs/pr/3")),
        ("hf://org/name", RepoId("org/name")),
        ("hf:/org/name@main", RepoId("org/name", "main")),
        ("hf://models/org/name", RepoId("org/name")),
        ("https://huggingface.co/org/name", RepoId("org/name")),
        ("https://huggingface.co/org/name/tree/v2", RepoId("org/name", "v2")),
        ("https://huggingface.co/o/n/blob/main/a.Q4_0.gguf", RepoId("o/n", "main", None, "a.Q4_0.gguf")),
        ("org/name-GGUF:Q4_K_M", RepoId("org/name-GGUF", None, "Q4_K_M")),
        ("org/name/Q4/a.gguf", RepoId("org/name", None, None, "Q4/a.gguf")),
        *((path, None) for path in ("name", "./org/name", "/org/name", "~/org", "a/b/c", "../x", "",
                                    "org/name/", "org/a.gguf", "org/config.json", "org name/x",
                                    "org/na\x1bme", "-x/y", "x" * 99 + "/y")),
    ],
)  # fmt: skip
def test_what_is_a_name_and_what_a_path(text, expected):
    assert RepoId.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["hf://name", "hf://datasets/org/name", "https://example.org/a/b", "s3://a/b", "hf://a/b c"],
)
def test_an_address_that_is_no_model_is_refused(text):
    with pytest.raises(UsageError, match="not the name of a model on the hub"):
        RepoId.parse(text)


def test_a_model_is_quantized_shard_by_shard_and_nothing_of_it_stays(org_tiny, tiny_nf4, tmp_path):
    from qmix.commands import sources
    from qmix.formats.files.manifest import read_manifest
    from qmix.quantize.methods import QuantizeRequest, quantize_checkpoint

    out, used = tmp_path / "out", []

    def watch(*_):
        folders = (tmp_path / "home", tmp_path / "out.partial")
        paths = [path for folder in folders for path in folder.rglob("*")]
        used.append(sum(p.stat().st_size for p in paths if p.is_file() and not p.is_symlink()))

    with sources.shard_by_shard(Path("org/tiny"), yes=True) as supply:
        request = QuantizeRequest(method="nf4", discard_source=True)
        quantize_checkpoint(supply.path, out, request, None, progress=watch, supply=supply)
    assert read_manifest(out) == read_manifest(tiny_nf4)
    written = sum(path.stat().st_size for path in out.iterdir())
    assert max(used) < written + 2 * 5_000_000
    (model,) = cache.models(HubOptions())
    assert model.nbytes < 400_000  # the texts
    with pytest.raises(UsageError, match="nothing of yours is removed"):
        sources.shard_by_shard(tmp_path, yes=True).__enter__()
    with pytest.raises(UsageError, match="--discard-source does not apply to --method gptq"):
        QuantizeRequest(method="gptq", discard_source=True)
