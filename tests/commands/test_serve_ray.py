"""`qmix serve --ray`: its options, and the arguments of a config file of Ray's."""

import sys

import pytest

from qmix.commands import ray_config
from qmix.commands.serve_ray import RayOptions
from qmix.errors import QmixError, UsageError
from qmix.serving.http.cluster.scale import Scale
from tests.support.models import TINY
from tests.support.process import qmix


@pytest.fixture
def _with_ray(monkeypatch):
    monkeypatch.setattr("qmix.serving.ray_cluster.find_spec", lambda name: name)


@pytest.mark.usefixtures("_with_ray")
def test_replicas_are_a_number_or_bounds():
    assert RayOptions().parse() is None
    assert RayOptions(ray=True).parse() == Scale()
    assert RayOptions(ray=True, replicas=3, cpus=8).parse() == Scale(least=3, most=3, cpus=8)
    assert RayOptions(ray=True, autoscale="2:5").parse() == Scale(least=2, most=5)
    for wrong in ("", "2", "2:", ":2", "3:2", "0:2", "1:2:3", "a:b", "-1:2", "²:3", "1:99999"):
        with pytest.raises(UsageError, match="--autoscale"):
            RayOptions(ray=True, autoscale=wrong).parse()
    with pytest.raises(UsageError, match="contradict"):
        RayOptions(ray=True, replicas=1, autoscale="1:2").parse()


@pytest.mark.parametrize("option", [("--replicas", 2), ("--autoscale", "1:2"), ("--cpus", 2)])
def test_they_are_for_ray_only(option):
    done = qmix("serve", "--demo", *option)
    assert done.returncode == 2
    assert f"{option[0]}: only for --ray" in done.stderr


def test_without_ray_its_extra_is_named(monkeypatch):
    monkeypatch.setattr("qmix.serving.ray_cluster.find_spec", lambda name: None)
    done = qmix("serve", "--demo", "--ray")
    assert done.returncode == 3
    assert "pip install 'qmix-runtime[ray]'" in done.stderr


@pytest.mark.usefixtures("_with_ray")
def test_a_port_must_be_known_before():
    done = qmix("serve", "--demo", "--ray", "--port", 0)
    assert done.returncode == 2
    assert "--port" in done.stderr


class FakeServe:
    """Of Ray Serve's, what builds an application: it is (options, class, arguments)."""

    def deployment(self, **options):
        self.options = options
        return self

    def ingress(self):
        return lambda kind: kind

    def __call__(self, kind):
        self.kind = kind
        return self

    def bind(self, settings):
        return self.options, self.kind, settings


@pytest.fixture
def _fake_ray(monkeypatch):
    fake = type(sys)("ray")
    fake.serve = FakeServe()
    monkeypatch.setitem(sys.modules, "ray", fake)


@pytest.mark.usefixtures("_fake_ray")
def test_a_config_file_says_what_the_command_line_does(monkeypatch, tmp_path):
    key = tmp_path / "key"
    key.write_text("secret\n")
    given = {"model": str(TINY), "ctx": "64", "slots": 2, "kv": "int8", "device": "cpu"}
    given |= {"api_key_file": str(key), "host_names": ["Model.Example"], "speculate": "off"}
    options, kind, settings = ray_config.application(given)
    assert kind.__name__ == options["name"] == "Replica"
    assert options["max_ongoing_requests"] == settings.limits.slots == 2
    assert (settings.access.key, settings.access.host_names) == ("secret", {"model.example"})
    assert (settings.limits.context, settings.speculate) == (64, False)
    assert settings.load().kv == "int8"


def test_a_config_file_that_is_wrong_is_refused(monkeypatch):
    monkeypatch.delenv("QMIX_API_KEY", raising=False)
    for given, said in (
        ({}, "expected model"),
        ({"model": str(TINY)}, "there is no key"),
        ({"model": str(TINY), "replicas": 2}, "args: replicas: unknown"),
    ):
        with pytest.raises(UsageError, match=said):
            ray_config.application(given)
    monkeypatch.setenv("QMIX_API_KEY", "k")
    for given in ({"model": "/nowhere"}, {"model": str(TINY), "ctx": "2k"}):
        with pytest.raises(QmixError):
            ray_config.application(given)
