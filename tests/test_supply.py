"""What importing the package costs and touches, and that what it depends on is written down."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import conftest
import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("diffusers", "transformers", "peft", "matplotlib", "scipy", "accelerate", "datasets", "pyarrow", "pandas",
         "tensorboard", "wandb", "trackio", "triton", "PIL", "sklearn", "torchvision", "rich.progress")  # fmt: skip


def test_importing_touches_no_network_starts_nothing_and_imports_nothing_heavy() -> None:
    """As Python itself sees it: every socket, process, file and import, by an audit hook."""
    code = """
import json, os, sys
import torch  # what it does is its own
before = set(sys.modules)
seen = []
def watch(event, given):
    if event.startswith(("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.system", "urllib.",
                         "os.mkdir", "os.remove", "os.rename", "shutil.", "tempfile.")):
        seen.append(event)
    if event == "open" and isinstance(given[1], str) and set(given[1]) & set("wax+"):
        if not str(given[0]).endswith((".pyc", os.devnull)) and ".pyc." not in str(given[0]):
            seen.append(f"open {given[0]} {given[1]}")
sys.addaudithook(watch)
import grafting
print(json.dumps([sorted(set(sys.modules) - before), seen]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules, seen = json.loads(done.stdout)
    assert seen == []
    assert [m for m in modules if m.startswith(tuple(f"{name}." for name in HEAVY)) or m in HEAVY] == []


def test_tests_reach_no_other_machine() -> None:
    """The rule of conftest.py, which fails every test that tries."""
    for host in ("192.0.2.1", "huggingface.co"):
        with pytest.raises(ConnectionRefusedError, match="tests use no network"):
            socket.create_connection((host, 443), timeout=1)
    assert conftest.ATTEMPTS == ["socket.getaddrinfo 192.0.2.1", "socket.getaddrinfo huggingface.co"]
    conftest.ATTEMPTS.clear()
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def listed(text: str) -> set[str]:
    """Names of packages as requirements have them, in the form that the index compares."""
    names = re.findall(r"^\s*([A-Za-z0-9][\w.-]*)", text, flags=re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def project() -> dict[str, Any]:
    """The project's table in pyproject.toml; Python 3.10 has no reader for it."""
    reader = pytest.importorskip("tomllib")
    found: dict[str, Any] = reader.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def test_every_dependency_has_its_licence_written_down() -> None:
    direct = list(project()["dependencies"])
    for extra in project()["optional-dependencies"].values():
        direct += extra
    pinned = "\n".join(
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    page = (ROOT / "docs" / "licences.md").read_text()
    words = {re.sub(r"[-_.]+", "-", word).lower() for word in re.findall(r"[\w.-]*\w", page)}
    assert (listed("\n".join(direct)) | listed(pinned)) - words == set()


def test_every_default_dependency_is_pinned_for_development() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    assert listed("\n".join(project()["dependencies"])) <= listed(pins)
    assert all("==" in line for line in pins.splitlines() if line and not line.startswith("#"))
