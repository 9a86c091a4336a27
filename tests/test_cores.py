"""Cores that a process may use: by affinity, and by the quotas of control groups of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from grafting.cores import limit_threads, usable_cores
from grafting.launch import _environment


@pytest.fixture
def _sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def machine(root: Path, groups: str, **files: str) -> Path:
    """A root folder with /proc/self/cgroup and files of /sys/fs/cgroup (`__` for `/`)."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(groups)
    for name, content in files.items():
        path = root / "sys" / "fs" / "cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_affinity_is_the_scheduler_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert usable_cores(tmp_path) == 3  # no control groups
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert usable_cores(tmp_path) == 12


@pytest.mark.usefixtures("_sixteen")
@pytest.mark.parametrize(("limit", "cores"), [
    ("200000 100000\n", 2), ("max 100000\n", 16), ("150000 100000\n", 2), ("5000 100000\n", 1),
    ("6400000 100000\n", 16), ("garbage\n", 16), ("100000 0\n", 16),
])  # fmt: skip
def test_quota_of_version_2(tmp_path: Path, limit: str, cores: int) -> None:
    assert usable_cores(machine(tmp_path, "0::/\n", **{"cpu.max": limit})) == cores


@pytest.mark.usefixtures("_sixteen")
def test_the_narrowest_group_on_the_way_up_counts(tmp_path: Path) -> None:
    files = {"pod__cpu.max": "300000 100000", "pod__task__cpu.max": "max 100000"}
    assert usable_cores(machine(tmp_path, "0::/pod/task\n", **files)) == 3


@pytest.mark.usefixtures("_sixteen")
def test_quota_of_version_1(tmp_path: Path) -> None:
    groups = "5:memory:/box\n1:cpu,cpuacct:/box\n0::/\n"
    files = {"cpu__box__cpu.cfs_quota_us": "400000\n", "cpu__box__cpu.cfs_period_us": "100000\n",
             "cpu__cpu.cfs_quota_us": "-1\n", "cpu__cpu.cfs_period_us": "100000\n"}  # fmt: skip
    assert usable_cores(machine(tmp_path, groups, **files)) == 4


@pytest.mark.usefixtures("_sixteen")
def test_threads_are_limited_where_a_quota_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    box = machine(tmp_path / "box", "0::/\n", **{"cpu.max": "200000 100000"})
    limit_threads(box)
    assert os.environ["OMP_NUM_THREADS"] == "1"  # the user's own word
    monkeypatch.delenv("OMP_NUM_THREADS")
    limit_threads(tmp_path / "none")
    assert "OMP_NUM_THREADS" not in os.environ
    limit_threads(box)
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grafting.launch.usable_cores", lambda: 8)
    for given, threads in ((None, "4"), ("8", "4"), ("3", "3"), ("1", "1")):
        if given is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert _environment(0, 2, 1234)["OMP_NUM_THREADS"] == threads


def test_here() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
