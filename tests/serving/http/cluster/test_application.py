"""Replicas on a Ray cluster: what Ray is told of them, and one without Ray."""

import pickle
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from qmix.commands.options import Load
from qmix.commands.service_settings import service_settings
from qmix.errors import QmixError, UsageError
from qmix.models.options import LoadOptions
from qmix.serving.http.cluster.application import Scale, options
from qmix.serving.http.cluster.replica import Replica
from qmix.serving.http.guard import Access
from tests.support.models import TINY


def settings(**given):
    return service_settings(TINY, Access(), **given)


def test_settings_go_to_other_processes_and_name_files_by_whole_paths(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inst.jinja").write_text("{{ messages }}")
    relative = settings(template="inst.jinja", log_prompts=Path("log"), ctx=64, slots=3, queue=7)
    assert pickle.loads(pickle.dumps(relative)) is not relative
    assert relative.template == str(tmp_path / "inst.jinja")
    assert (relative.prompt_log, relative.source.is_absolute()) == (tmp_path / "log", True)
    assert settings(template="inst").template == "inst"
    options = pickle.loads(pickle.dumps(relative)).load()
    assert isinstance(options, LoadOptions)
    assert (options.max_context, options.max_batch) == (64, 3)


def test_ray_is_told_of_slots_and_of_the_queue():
    told = options(settings(slots=3, queue=7, timeout=90.0), Scale(least=2, most=2, cpus=4, gpus=1))
    assert told["num_replicas"] == 2
    assert "autoscaling_config" not in told
    assert told["ray_actor_options"] == {"num_cpus": 4, "num_gpus": 1}
    assert (told["max_ongoing_requests"], told["max_queued_requests"]) == (3, 7)
    assert told["graceful_shutdown_timeout_s"] == 90.0
    scaled = options(settings(slots=3), Scale(least=1, most=4))
    assert "num_replicas" not in scaled
    assert scaled["autoscaling_config"] == {
        "min_replicas": 1,
        "max_replicas": 4,
        "target_ongoing_requests": 3,
    }


def test_what_ray_cannot_do_is_refused():
    with pytest.raises(UsageError, match="--queue"):
        options(settings(queue=0), Scale())


def test_a_replica_answers_and_is_unhealthy_once_its_engine_has_ended():
    chosen = settings(ctx=64, slots=1, load=Load(device="cpu"))
    replica = Replica(chosen)
    asked = {"prompt": "def add(", "max_tokens": 2}
    with TestClient(replica.__serve_build_asgi_app__(), base_url="http://localhost") as client:
        replica.check_health()
        assert client.post("/v1/completions", json=asked).status_code == 200
        replica.__del__()
        assert client.get("/health").status_code == 503
    with pytest.raises(QmixError, match="takes no requests"):
        replica.check_health()
