"""What several processes give against one, and what is left when one of them is killed.

    python scripts/chaos/processes.py equality [--steps 100] [--out FILE]
    python scripts/chaos/processes.py ends [--out FILE]

`equality` trains each stage from the same start on a miniature with 1, 2 and 4 processes on the CPU (stage 2 replicated
and sharded) and prints the largest differences of the logged losses. `ends` kills and stops processes of a real
command. docs/reliability.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

RECIPE: dict[str, Any] = {
    "name": "miniature", "data": "data.npz", "model": "model",
    "plan": [{"replace": {"target": "mha", "layers": "interleaved-50", "with": "hyena_x"}}],
    "distill": {"precision": "fp32", "batch_size": 18, "num_validation": 24, "log_every": 1, "validate_every": 10},
    "finetune": {"precision": "fp32", "batch_size": 18, "num_validation": 24, "log_every": 1, "validate_every": 10},
    "sample": {"num": 20, "steps": 2, "batch_size": 3}, "evaluate": None,
}  # fmt: skip


def world(folder: Path, distill: dict[str, Any] | None, finetune: dict[str, Any] | None) -> None:
    """A tiny DiT with drawn weights, noisy images, and the recipe with these changes of its stages."""
    import torch

    from grafting import save_model
    from grafting.models.dit import DiT, DiTConfig

    if not (folder / "model").exists():
        torch.manual_seed(0)
        model = DiT(DiTConfig(input_size=32, patch_size=8, in_channels=1, hidden_size=64, depth=4, num_heads=4,
                              num_classes=10))  # fmt: skip
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.15)
        save_model(model, folder / "model")
        generator = np.random.default_rng(0)
        images = (
            np.cumsum(generator.normal(size=(400, 1, 32, 32)), axis=-1).clip(-9, 9).astype(np.float32) / 9
        )
        np.savez(folder / "data.npz", arr_0=images, arr_1=np.arange(400) % 10)
    stages = {
        "distill": None if distill is None else {**RECIPE["distill"], **distill},
        "finetune": None if finetune is None else {**RECIPE["finetune"], **finetune},
    }
    (folder / "recipe.yaml").write_text(json.dumps({**RECIPE, **stages}))


def start(folder: Path, name: str, processes: int, *more: str) -> subprocess.Popen[str]:
    """`graft run` in its own session, so that the processes of one attempt can be found."""
    command = [sys.executable, "-m", "grafting", "run", "recipe.yaml", "--out", name, *more]
    if processes > 1:
        command += ["--processes", str(processes)]
    return subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], patience: float = 900) -> tuple[int, list[str]]:
    """Exit status and the error lines."""
    _, stderr = process.communicate(timeout=patience)
    return process.returncode, [
        line for line in stderr.splitlines() if not line.startswith(("distill ", "finetune "))
    ]


def losses(record: Any, path: str = "") -> dict[str, float]:
    """The losses and errors of a line of the log, by their place."""
    if isinstance(record, dict):
        return {k: v for name, item in record.items() for k, v in losses(item, f"{path}/{name}").items()}
    return {path: record} if isinstance(record, float) and path not in ("/lr", "/grad_norm") else {}


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def differences(mine: Path, theirs: Path, stage: str, steps: range) -> float:
    """Largest difference of a stage's losses and errors in these steps, relative where they are above 1."""
    found = 0.0
    for a, b in zip(log(mine), log(theirs), strict=True):
        if a.get("stage") == stage and a["step"] in steps:
            x, y = losses(a), losses(b)
            found = max([found, *(abs(x[k] - y[k]) / max(1.0, abs(y[k])) for k in y)])
    return found


def equality(steps: int) -> list[dict[str, Any]]:
    rows = []
    several: list[tuple[str, int, dict[str, Any]]] = [
        ("one", 1, {}), ("one, parts of 5", 1, {"micro_batch": 5}), ("two", 2, {}), ("four", 4, {}),
    ]  # fmt: skip
    sharded = [(f"{name}, sharded", number, {"shard": "full"}) for name, number in (("two", 2), ("four", 4))]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for stage, runs in (("distill", several), ("finetune", several + sharded)):
            reference = folder / f"{stage}-one"
            for name, processes, changes in runs:
                mine = {"steps": steps, **changes}
                world(folder, mine if stage == "distill" else None, mine if stage == "finetune" else None)
                run = folder / f"{stage}-{name.replace(', ', '-').replace(' ', '-')}"
                code, lines = finish(start(folder, run.name, processes))
                if code:
                    raise SystemExit(f"{name}: {code}: {lines}")
                row: dict[str, Any] = {"stage": stage, "run": name}
                if run != reference:
                    row |= {
                        "steps 0-20": differences(run, reference, stage, range(21)),
                        f"step {steps}": differences(run, reference, stage, range(steps, steps + 1)),
                        "largest": differences(run, reference, stage, range(steps + 1)),
                        "samples of the teacher equal": (run / "samples/teacher.npz").read_bytes()
                        == (reference / "samples/teacher.npz").read_bytes(),
                    }
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def workers(launcher: int) -> list[int]:
    """Process ids of the launcher's children, first process first."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()

    def rank(pid: str) -> int:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return int(dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)[b"RANK"])

    return [int(pid) for pid in sorted(children, key=rank)]


def wait_for(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until stage 2 has logged a step."""
    while process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and any(r["stage"] == "finetune" and r["step"] >= step for r in log(folder)):
            return
        time.sleep(0.05)
    raise SystemExit(f"ended before step {step}: {finish(process)}")


def ends() -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        world(folder, None, {"steps": 60, "checkpoint_every": 10, "shard": "full"})
        code, lines = finish(start(folder, "whole", 1))
        if code:
            raise SystemExit(f"whole: {code}: {lines}")
        for name, victim, number in [
            ("worker killed", 1, signal.SIGKILL), ("first worker killed", 0, signal.SIGKILL),
            ("launcher stopped", -1, signal.SIGTERM), ("launcher interrupted", -1, signal.SIGINT),
            ("worker stopped", 1, signal.SIGTERM), ("launcher killed", -1, signal.SIGKILL),
        ]:  # fmt: skip
            run = folder / name.replace(" ", "-")
            process = start(folder, run.name, 2)
            wait_for(run, 25, process)
            pids = workers(process.pid)
            sent = time.perf_counter()
            os.kill(pids[victim] if victim >= 0 else process.pid, number)
            code, lines = finish(process, 60)
            while any(Path(f"/proc/{pid}").exists() for pid in pids):
                time.sleep(0.05)
            row: dict[str, Any] = {
                "what": name, "status": code, "error lines": [line for line in lines if line.startswith("error:")],
                "seconds until all were gone": round(time.perf_counter() - sent, 1),
                "newest checkpoint": max(int(p.stem) for p in run.glob("checkpoints/finetune/*.pt")),
            }  # fmt: skip
            for processes in (1, 4):
                copy = folder / f"{run.name}-{processes}"
                subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
                code, lines = finish(start(folder, copy.name, processes, "--resume"))
                if code:
                    raise SystemExit(f"resume on {processes}: {code}: {lines}")
                row[f"resumed on {processes}"] = differences(copy, folder / "whole", "finetune", range(61))
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("equality", "ends"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = equality(given.steps) if given.what == "equality" else ends()
    if given.out:
        given.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
