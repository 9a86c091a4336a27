"""What the tests of the command line share: `graft` in this process or another, and what it is given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_dit

from grafting import GraftPlan, Replace, cli, graft, load_model, save_graft, save_model
from grafting.formats.published import export_published

Graft = Callable[..., tuple[int, str, str]]
HYENA = "- replace: {target: mha, layers: interleaved-50, with: hyena_x}\n"
QUICK = {
    "steps": 4, "batch_size": 8, "num_validation": 16, "log_every": 1, "validate_every": 2, "checkpoint_every": 2,
    "precision": "fp32",
}  # fmt: skip


def caller(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Graft:
    """A function that calls `graft` in this process, in the new folder `cwd`: (exit status, stdout, stderr)."""
    (folder / "cwd").mkdir()
    monkeypatch.chdir(folder / "cwd")

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["graft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        return int(stop.value.code or 0), output.out, output.err

    return call


def make_world(folder: Path) -> Path:
    """Tiny models, plans and data, good and bad."""
    teacher = tiny_dit(input_size=32, patch_size=8, num_classes=10)
    save_model(teacher, folder / "model")
    export_published(teacher, folder / "model.pt")
    student = graft(load_model(folder / "model"), GraftPlan([Replace("mha", [1], "swa")]))
    save_graft(student, folder / "graft")
    export_published(student, folder / "grafted.pt")
    save_graft(student, folder / "orphan")
    manifest = json.loads((folder / "orphan/graft.json").read_text())
    save_model(tiny_dit(seed=1, input_size=32, patch_size=8, num_classes=10), folder / "other")
    manifest["base"]["source"] = str(folder / "other")
    (folder / "orphan/graft.json").write_text(json.dumps(manifest))

    whole = (folder / "model.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    plans = {
        "plan": HYENA,
        "mixed": "- replace: {target: mlp, layers: [0, 2], with: {mlp: {ratio: 3}}, init: random, loss: l2}\n" + HYENA,
        "empty": "[]\n", "blank": "", "operator": HYENA.replace("hyena_x", "hyena_z"),
        "key": HYENA.replace("hyena_x", "{hyena_x: {kernal_size: 3}}"), "selector": HYENA.replace("50", "55"),
        "twice": HYENA + HYENA.replace("interleaved-50", "[3]"), "layer": HYENA.replace("interleaved-50", "[4]"),
        "kernel": HYENA.replace("hyena_x", "{hyena_x: {kernel_size: 0}}"),
        "window": HYENA.replace("hyena_x", "{swa: {window: -3}}"),
        "tags": HYENA + "- !!python/object/apply:os.system [ls]\n",
        "overlap": "- parallelize: {groups: [[0, 1], [1, 2]]}\n", "gap": "- parallelize: {groups: [[0, 2]]}\n",
        "beyond": "- parallelize: {groups: [[3, 4]]}\n", "local": HYENA.replace("interleaved-50", "top-local-50"),
    }  # fmt: skip
    for name, text in plans.items():
        (folder / f"{name}.yaml").write_text(text)
    images = np.random.default_rng(0).normal(size=(80, 1, 32, 32)).astype(np.float32)
    labels = np.arange(80) % 10
    np.savez(folder / "data.npz", arr_0=images, arr_1=labels)
    np.savez(folder / "nan.npz", arr_0=np.where(images > 2, np.nan, images), arr_1=labels)
    np.savez(folder / "wide.npz", arr_0=images.reshape(40, 2, 32, 32), arr_1=labels[:40])
    np.savez(folder / "classes.npz", arr_0=images, arr_1=labels + 1)
    recipe = {
        "name": "tiny", "model": str(folder / "model"), "data": str(folder / "data.npz"),
        "plan": [{"replace": {"target": "mha", "layers": "interleaved-50", "with": "hyena_x"}}],
        "distill": QUICK, "finetune": QUICK,
        "sample": {"num": 20, "steps": 2, "sampler": "dpm++"},
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(json.dumps(recipe))
    return folder


def contents(*folders: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for folder in folders for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


def start(arguments: list[Any]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(cli.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    )
    return subprocess.Popen(
        [sys.executable, "-m", "grafting", *map(str, arguments)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
