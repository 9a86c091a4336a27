"""Train a miniature for many thousands of steps and watch what it holds: memory, open files, the size of its logs.

    python scripts/chaos/long_run.py --out /tmp/long            # 20,000 steps of each training stage
    python scripts/chaos/long_run.py --out /tmp/long --steps 500 --seconds 0.2

Killed and started again with the same folder it goes on. The run is `graft run` in a process of its own; this one
notes its resident memory and its number of file descriptors into OUT/held.jsonl, and the sizes of the files of the
run; two hundred times a stage that process counts what it holds itself (`inside.py`) into OUT/inside.jsonl. Prints a
JSON object: per stage the slopes (least squares, second half of the stage) with 95% intervals of a moving-block
bootstrap of the deviations, and the first and last numbers of descriptors. Exit status 1 if memory or descriptors grow.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = os.sysconf("SC_PAGE_SIZE")
STAGES = ("distill", "finetune")
TOLERATED_MB = 4.0  # of growth over a stage that is no finding: an allocator's arenas


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20_000, help="of each stage")
    parser.add_argument("--seconds", type=float, default=1.0, help="between two looks")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    recipe = options.out / "recipe.yaml"
    if not recipe.exists():
        make(options.out, options.steps)
    run = options.out / "run"
    status = watch(recipe, run, options.out, options.seconds, max(1, options.steps // 200))
    found = figures(options.out, run, options.steps) | {"steps": options.steps, "exit_status": status}
    print(json.dumps(found, indent=2))
    raise SystemExit(1 if status or found["findings"] else 0)


def make(folder: Path, steps: int) -> None:
    """A model of 2 blocks of width 16, its data and a recipe of two long stages in `folder`."""
    import numpy as np
    import torch

    from grafting import save_model
    from grafting.models.dit import DiT, DiTConfig
    from grafting.yaml_io import dump_yaml

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiT(DiTConfig(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2,
                              num_classes=4))  # fmt: skip
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter) * 0.1
    save_model(model, folder / "model")
    draw = np.random.default_rng(0)
    np.savez(
        folder / "data.npz", arr_0=draw.normal(size=(60, 1, 8, 8)).astype(np.float32), arr_1=np.arange(60) % 4
    )
    stage = {"steps": steps, "batch_size": 2, "num_validation": 6, "log_every": 1, "validate_every": 250,
             "checkpoint_every": 500, "precision": "fp32"}  # fmt: skip
    recipe = {
        "model": str(folder / "model"), "data": str(folder / "data.npz"), "evaluate": None,
        "plan": [{"replace": {"target": "mha", "layers": [1], "with": "hyena_x"}}],
        "sample": {"num": 8, "steps": 2}, "distill": {**stage, "early_stop": 0, "fit_samples": 8},
        "finetune": {**stage, "preview_every": 5000},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(dump_yaml(recipe))


def watch(recipe: Path, run: Path, folder: Path, seconds: float, every: int) -> int:
    """Run, or go on, and note what the process holds; its exit status."""
    inside = [str(Path(__file__).with_name("inside.py")), str(folder / "inside.jsonl"), str(every)]
    command = [sys.executable, *inside, "run", str(recipe), "--out", str(run), "--resume"]
    with (folder / "console.log").open("ab") as log, (folder / "held.jsonl").open("a") as notes:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                if (line := held(process.pid, run)) is not None:
                    notes.write(json.dumps(line) + "\n")
                    notes.flush()
                time.sleep(seconds)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return process.returncode


def held(pid: int, run: Path) -> dict[str, Any] | None:
    """What a process holds at this moment, and where its run stands."""
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 1e6
        files = len(os.listdir(f"/proc/{pid}/fd"))
        last = tail(run / "metrics.jsonl")
    except (OSError, ValueError, IndexError):
        return None
    return {
        "pid": pid,
        "stage": last.get("stage"),
        "step": last.get("step"),
        "mb": round(resident, 3),
        "fds": files,
    }


def tail(path: Path) -> dict[str, Any]:
    """The last whole line of a log."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")
    found: dict[str, Any] = json.loads(lines[-2])
    return found


def figures(folder: Path, run: Path, steps: int) -> dict[str, Any]:
    """Slopes and sizes out of the notes."""
    notes = [json.loads(line) for line in (folder / "held.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"findings": []}
    for stage in STAGES:
        rows = [
            row for row in notes if row["stage"] == stage and row["step"] < steps
        ]  # after the last: the report
        pids = [row["pid"] for row in rows]
        rows = [row for row in rows if row["pid"] == max(set(pids), key=pids.count)]
        if len(rows) < 20:
            found[stage] = {"looks": len(rows)}
            continue
        half = rows[len(rows) // 2 :]
        slope, interval = fit([row["step"] for row in half], [row["mb"] for row in half])
        found[stage] = {
            "looks": len(rows), "mb_first": rows[0]["mb"], "mb_middle": half[0]["mb"], "mb_last": rows[-1]["mb"],
            "kb_per_1000_steps": rounded(slope * 1e6), "kb_interval": [rounded(end * 1e6) for end in interval],
            "fds_first": rows[len(rows) // 10]["fds"], "fds_last": rows[-1]["fds"],
            "fds_most": max(row["fds"] for row in rows),
        }  # fmt: skip
        if interval[0] > 0 and slope * steps > TOLERATED_MB:
            found["findings"].append(f"{stage}: memory grows by {slope * steps:.1f} MB over {steps} steps")
        if found[stage]["fds_last"] > found[stage]["fds_first"] + 2:
            found["findings"].append(f"{stage}: file descriptors grow")
        found[stage] |= counted(folder / "inside.jsonl", stage, steps)
    found["bytes"] = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in (run / "metrics.jsonl", run / "status.json", run / "run.json", run / "report.html",
                     folder / "console.log") if path.exists()
    }  # fmt: skip
    found["metrics_lines"] = (run / "metrics.jsonl").read_bytes().count(b"\n")
    return found


def counted(path: Path, stage: str, steps: int) -> dict[str, Any]:
    """Slopes of what the process counted itself, per 1,000 steps over the second half of a stage."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if row["stage"] == stage and steps // 2 <= row["step"] < steps]
    found: dict[str, Any] = {"counts": len(rows)}
    for name in ("blocks", "objects", "malloc_kb") if len(rows) >= 20 else ():
        values = [row[name] for row in rows]
        if None not in values:
            slope, interval = fit([row["step"] for row in rows], values)
            found[f"{name}_per_1000_steps"] = rounded(slope * 1e3)
            found[f"{name}_interval"] = [rounded(end * 1e3) for end in interval]
            found[f"{name}_last"] = values[-1]
    return found


def fit(x: Sequence[float], y: Sequence[float], draws: int = 2000) -> tuple[float, tuple[float, float]]:
    """Least-squares slope, and its 95% interval: moving blocks of sqrt(n) neighbouring deviations are drawn anew."""
    import numpy as np

    a, b = np.asarray(x, float), np.asarray(y, float)
    a = a - a.mean()
    spread = (a * a).sum() or 1.0
    slope = float((a * b).sum() / spread)
    left = b - b.mean() - slope * a
    length = max(1, round(len(a) ** 0.5))
    draw = np.random.default_rng(0)
    starts = draw.integers(0, len(a) - length + 1, size=(draws, -(-len(a) // length)))
    places = (starts[:, :, None] + np.arange(length)).reshape(draws, -1)[:, : len(a)]
    slopes = slope + (left[places] * a).sum(1) / spread
    low, high = np.quantile(slopes, (0.025, 0.975))
    return slope, (float(low), float(high))


def rounded(value: float) -> float:
    """Three places."""
    return round(value, 3)


if __name__ == "__main__":
    main()
