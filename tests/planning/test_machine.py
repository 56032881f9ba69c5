"""What the machine says of itself, read from files like Linux's, and the file of measurements."""

import json
import os
import subprocess
from types import SimpleNamespace

import pytest

from qmix.planning import machine
from qmix.planning.machine import Measured

GIB = 1 << 30
MEMINFO = "MemTotal: 33554432 kB\nMemFree: 1 kB\nMemAvailable: 20971520 kB\n"


@pytest.fixture
def system(tmp_path):
    """A /proc and a /sys/fs/cgroup: 32 GiB, 20 of them free."""
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroup.mkdir()
    (proc / "meminfo").write_text(MEMINFO)
    (proc / "self" / "cgroup").write_text("0::/\n")
    return SimpleNamespace(proc=proc, cgroup=cgroup)


def memory(system):
    return machine.memory(system.proc, system.cgroup)


def group(folder, limit, used, inactive=0, *, version=2):
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {inactive}\n")


def test_without_control_groups(system):
    found = memory(system)
    assert (found.total, found.available, found.limit) == (32 * GIB, 20 * GIB, "system")


def test_a_limit_of_a_group_counts(system):
    group(system.cgroup, 8 * GIB, 3 * GIB)
    found = memory(system)
    assert (found.total, found.available, found.limit) == (8 * GIB, 5 * GIB, "cgroup")


def test_files_in_a_groups_memory_are_free(system):
    group(system.cgroup, 8 * GIB, 7 * GIB, 4 * GIB)
    assert memory(system).available == 5 * GIB


def test_no_limit_is_the_systems(system):
    group(system.cgroup, "max", 3 * GIB)
    assert memory(system).available == 20 * GIB


def test_a_limit_above_the_machine_may_still_bind(system):
    group(system.cgroup, 40 * GIB, 30 * GIB)
    found = memory(system)
    assert (found.total, found.available) == (32 * GIB, 10 * GIB)


def test_the_tightest_of_nested_groups_counts(system):
    (system.proc / "self" / "cgroup").write_text("0::/a/b\n")
    group(system.cgroup / "a", 6 * GIB, GIB)
    group(system.cgroup / "a" / "b", 9 * GIB, GIB)
    found = memory(system)
    assert (found.total, found.available) == (6 * GIB, 5 * GIB)


def test_version_one(system):
    (system.proc / "self" / "cgroup").write_text("3:cpu:/\n4:cpuset,memory:/box\n0::/\n")
    group(system.cgroup / "memory", 1 << 63, 0, version=1)
    group(system.cgroup / "memory" / "box", 4 * GIB, GIB, version=1)
    assert memory(system).total == 4 * GIB


def test_a_full_group_leaves_nothing(system):
    group(system.cgroup, 2 * GIB, 3 * GIB)
    assert memory(system).available == 0


def test_this_machine():
    found = machine.memory()
    assert 0 < found.available <= found.total
    assert machine.cores() >= 1
    assert machine.processor()


def smi(output):
    def run(command, **options):
        assert command[0] == "nvidia-smi"
        assert options["timeout"] <= 10
        return SimpleNamespace(stdout=output)

    return run


LINES = (
    "NVIDIA GeForce RTX 3090, 24576, 24000, 550.54, 8.6\n"
    "NVIDIA H100 80GB HBM3, 81559, 81000, 550.54, 9.0\n"
)


def test_gpus_are_read_from_nvidia_smi(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second = machine.gpus(smi(LINES))
    assert (first.name, first.total, first.free) == (
        "NVIDIA GeForce RTX 3090",
        24 * GIB,
        24000 << 20,
    )
    assert second.capability == (9, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert machine.gpus(smi(LINES)) == (second,)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpus(smi(LINES)) == ()


def test_no_gpus_where_nvidia_smi_is_missing_or_fails(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.gpus(smi(LINES)) == ()
    monkeypatch.setattr(machine.shutil, "which", lambda name: name)

    def fails(*_, **__):
        raise subprocess.TimeoutExpired("nvidia-smi", 10)

    assert machine.gpus(fails) == ()
    assert machine.gpus(smi("No devices were found\n")) == ()


def test_measurements_are_kept_by_machine(tmp_path):
    path = tmp_path / "cache" / "qmix" / "machine.json"
    one = Measured(key="a", host_read=38e9, disk_read=2e9, date="2026-01-01T00:00:00+00:00")
    other = Measured(key="b", host_read=60e9, device_copy=8e11, interconnect=25e9)
    assert machine.measurements("a", path) == machine.SavedMeasurements()
    machine.save(one, path)
    machine.save(other, path)
    assert machine.measurements("a", path).measured == one
    assert machine.measurements("b", path).measured == other
    newer = Measured(key="a", host_read=40e9)
    machine.save(newer, path)
    assert machine.measurements("a", path).measured == newer
    assert machine.measurements("c", path).measured is None
    assert [p.name for p in path.parent.iterdir()] == [
        "machine.json"
    ]  # no remainder of the writing


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"version": 2, "machines": []}',
        '{"version": 1, "machines": 3}',
        '{"version": 1, "machines": [3]}',
        '{"version": 1, "machines": [{"key": "a"}]}',
        '{"version": 1, "machines": [{"key": "a", "host_read": -1}]}',
        '{"version": 1, "machines": [{"key": "a", "host_read": true}]}',
        '{"version": 1, "machines": [{"key": "a", "host_read": null}]}',
        '{"version": 1, "machines": [{"key": "a", "host_read": 1, "disk_read": "x"}]}',
        '{"version": 1, "machines": [{"key": 7, "host_read": 1}]}',
        '{"version": 1, "machines": [{"key": "a", "host_read": 1, "date": 5}]}',
        '{"version": 1, "machines": [{"key": "a", "host_read": 1, "rm": 1}]}',
        '{"version": 1, "machines": [{"key": "a", "host_read": NaN}]}',
    ],
)
def test_a_damaged_file_is_reported_and_ignored(tmp_path, content):
    path = tmp_path / "machine.json"
    path.write_text(content)
    found = machine.measurements("a", path)
    assert found.measured is None
    assert str(path) in found.trouble
    assert "\n" not in found.trouble
    machine.save(Measured(key="a", host_read=1e9), path)
    assert machine.measurements("a", path).measured.host_read == 1e9


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = machine.save(Measured(key="a", host_read=1e9), tmp_path / "machine.json")
    before = path.read_bytes()

    def fail(_):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        machine.save(Measured(key="a", host_read=2e9), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_place_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.measurements_path() == tmp_path / "qmix" / "machine.json"
    monkeypatch.setenv("HOME", str(tmp_path))
    home = tmp_path / ".cache" / "qmix" / "machine.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert machine.measurements_path() == home
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert machine.measurements_path() == home


def test_what_is_written_is_plain_json(tmp_path):
    path = machine.save(Measured(key="a", host_read=1e9), tmp_path / "machine.json")
    assert json.loads(path.read_text())["machines"][0]["host_read"] == 1e9


def node_tree(root, with_memory, **cpulists):
    for node, cpus in cpulists.items():
        (root / node).mkdir()
        (root / node / "cpulist").write_text(f"{cpus}\n")
    (root / "has_memory").write_text(f"{with_memory}\n")
    return root


def test_numa_nodes_are_those_with_memory_and_processors_of_this_process(tmp_path):
    root = node_tree(tmp_path, "0-1,3", node0="0-3,8-11", node1="4-7,12-15", node2="16", node3="")
    assert machine.numa_nodes(root, range(17)) == (0, 1)
    assert machine.numa_nodes(root, (5, 12)) == (1,)
    assert machine.numa_nodes(root / "missing", range(17)) == ()
    (root / "node1" / "cpulist").write_text("nonsense\n")
    assert machine.numa_nodes(root, range(17)) == (0,)


def test_the_page_cache_has_room_in_most_of_what_is_left(monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: machine.HostMemory(total=100, available=80))
    assert machine.cache_room(beside=0) == 60
    assert machine.cache_room(beside=40) == 30
    assert machine.cache_room(beside=100) == 0
