"""Kill a run again and again, resume it each time, and compare what it ends with to a run that nobody touched.

    python scripts/chaos/kill_resume.py                        # stages 1 and 2 of a miniature, 25 times SIGKILL
    python scripts/chaos/kill_resume.py --case cached          # the same with stored activations in stage 1
    python scripts/chaos/kill_resume.py --case study           # rows of a study
    python scripts/chaos/kill_resume.py --case synthesize      # pairs of a tiny text-to-image pipeline
    python scripts/chaos/kill_resume.py -- synthesize ...      # any command of graft; OUT stands for its folder
    python scripts/chaos/kill_resume.py --signal TERM --kills 6

The moments are random in the course of the run (lines of its log, stages done), every other one as soon as a file is
being written. Prints a JSON object; exit status 1 if anything differs. One process imports the package and forks the
runs, so that a kill costs no start.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

RECIPE: dict[str, Any] = {
    "plan": [
        {"replace": {"target": "mha", "layers": [1, 3], "with": "hyena_x"}},
        {"replace": {"target": "mlp", "layers": [0], "with": {"mlp": {"ratio": 2}}, "init": "random"}},
    ],
    "evaluate": None, "sample": {"num": 8, "steps": 3, "sampler": "ddpm"},
    "distill": {"steps": 60, "batch_size": 8, "num_validation": 8, "warmup": 10, "log_every": 3, "validate_every": 4,
                "checkpoint_every": 7, "early_stop": 5, "fit_samples": 16, "precision": "fp32"},
    "finetune": {"steps": 60, "batch_size": 8, "num_validation": 8, "warmup": 10, "log_every": 3, "validate_every": 4,
                 "checkpoint_every": 7, "optimizer": "muon", "objectives": {"diffusion": 1.0, "output": 1.0},
                 "label_dropout": 0.3, "precision": "fp32"},
}  # fmt: skip
STUDY = [
    "study",
    "demo-ablation",
    "--only",
    "both",
    "--only",
    "teacher",
    "--only",
    "teacher-finetuned",
    "--out",
    "OUT",
]
STUDY_SETTINGS = [
    *(f"{stage}.{key}" for stage in ("distill", "finetune")
      for key in ("steps=12", "batch_size=4", "num_validation=4", "log_every=1", "checkpoint_every=2",
                  "validate_every=3")),
    "distill.fit_samples=8", "sample.num=12", "sample.steps=2",
]  # fmt: skip
TIMES = {
    "seconds",
    "environment",
    "extraction_seconds",
    "training, s",
    "peak_bytes",
}  # differ from run to run


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--signal", default="KILL", choices=("KILL", "TERM", "INT"))
    parser.add_argument("--case", default="run", choices=("run", "cached", "study", "synthesize"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep the folders here")
    parser.add_argument("command", nargs="*", help="a command of graft, with OUT for its folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as scratch:
        folder = options.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = kill_and_compare(options, folder)
    print(json.dumps(found, indent=2))
    raise SystemExit(0 if found["identical"] and not found["wrong_exit_status"] else 1)


def kill_and_compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole experiment; its figures."""
    import grafting.cli
    import grafting.pipeline  # noqa: F401  (imported once, before the forks)

    command = options.command or default_command(options.case, folder)
    chance = random.Random(options.seed)
    whole, cut = folder / "whole", folder / "cut"
    started = time.monotonic()
    status = wait(start(command, whole, folder / "whole.log"))
    seconds = time.monotonic() - started
    if status:
        raise SystemExit(
            f"the untouched run ended with status {status}:\n{(folder / 'whole.log').read_text()}"
        )
    total = progress(whole)
    moments = sorted(chance.uniform(0, 0.98) * total for _ in range(options.kills))
    number = getattr(signal, f"SIG{options.signal}")
    expected = {"KILL": -signal.SIGKILL, "TERM": 143, "INT": 130}[options.signal]
    statuses: list[int] = []
    latencies: list[float] = []
    midway = 0
    for count, moment in enumerate(moments):
        process = start(command, cut, folder / "cut.log", resume=cut.exists())
        while progress(cut) < moment and alive(process):
            time.sleep(0.01)
        if count % 2:
            while not partial(cut) and alive(process):
                time.sleep(0.0005)
        else:
            time.sleep(chance.uniform(0, 0.1 * seconds))
        if not alive(process):
            break
        sent = time.monotonic()
        os.kill(process, number)
        statuses.append(wait(process))
        latencies.append(time.monotonic() - sent)
        midway += bool(partial(cut))
    last = wait(start(command, cut, folder / "cut.log", resume=cut.exists()))
    differing = compare(whole, cut)
    return {
        "command": ["graft", *command],
        "signal": f"SIG{options.signal}",
        "sent": len(statuses),
        "inside_a_write": midway,
        "wrong_exit_status": [status for status in statuses if status != expected],
        "slowest_exit_seconds": round(max(latencies, default=0.0), 3),
        "last_exit_status": last,
        "files_compared": len(files(whole)),
        "differing": differing,
        "identical": last == 0 and not differing,
        "untouched_run_seconds": round(seconds, 1),
        "all_seconds": round(time.monotonic() - started, 1),
    }


def default_command(case: str, folder: Path) -> list[str]:
    """A miniature model, its data and a recipe in `folder`; the command that runs it."""
    import numpy as np
    import torch

    from grafting import save_model
    from grafting.models.dit import DiT, DiTConfig
    from grafting.yaml_io import dump_yaml

    if case == "study":
        return [*STUDY, *(part for setting in STUDY_SETTINGS for part in ("--set", setting))]
    if case == "synthesize":
        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
        from pixart_tools import save_tiny_pipeline

        save_tiny_pipeline(folder / "pipeline")
        (folder / "prompts.txt").write_text("the red cat\nthe blue moon\ngreen sun\n")
        return ["synthesize", str(folder / "pipeline"), "--prompts", str(folder / "prompts.txt"), "--num", "24",
                "--steps", "4", "--shard-size", "2", "--out", "OUT"]  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiT(DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=4, num_heads=4,
                              num_classes=4))  # fmt: skip
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter) * 0.1
    save_model(model, folder / "model")
    draw = np.random.default_rng(0)
    np.savez(
        folder / "data.npz", arr_0=draw.normal(size=(90, 1, 8, 8)).astype(np.float32), arr_1=np.arange(90) % 4
    )
    recipe = {"model": str(folder / "model"), "data": str(folder / "data.npz"), **RECIPE}
    if case == "cached":
        recipe["distill"] = {**recipe["distill"], "mode": "cached", "cache_samples": 40}
    (folder / "recipe.yaml").write_text(dump_yaml(recipe))
    return ["run", str(folder / "recipe.yaml"), "--out", "OUT"]


# ---- processes


def start(command: list[str], out: Path, log: Path, resume: bool = False) -> int:
    """The process number of a fork that runs a command of graft."""
    process = os.fork()
    if process:
        return process
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.argv = [
        "graft",
        *(str(out) if part == "OUT" else part for part in command),
        *(["--resume"] if resume else []),
    ]
    import torch

    from grafting.cli import main as graft

    torch.set_num_threads(1)
    code: Any = 1
    try:
        graft()
    except SystemExit as error:
        code = error.code
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)


def wait(process: int) -> int:
    """Exit status of a process, or minus the signal that ended it."""
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def alive(process: int) -> bool:
    """Whether a child of ours still runs; it is left for `wait` if not."""
    found = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return found is None


# ---- folders


def progress(folder: Path) -> int:
    """How far a run is: lines of its logs, and twenty for each stage, or file of synthetic pairs, that is done."""
    lines = stages = 0
    for path in folder.rglob("metrics.jsonl"):
        with contextlib.suppress(OSError):
            lines += path.read_bytes().count(b"\n")
    for path in folder.rglob("run.json"):
        with contextlib.suppress(OSError, ValueError):
            stages += len(json.loads(path.read_bytes())["stages"])
    if (folder / "captions.jsonl").exists():
        stages += sum(not path.name.startswith(".") for path in folder.glob("*.safetensors"))
    return lines + 20 * stages


def partial(folder: Path) -> list[str]:
    """Files that are being written, or were when their process was killed."""
    return [
        os.path.join(root, name)
        for root, _, names in os.walk(folder)
        for name in names
        if name.startswith(".") and name.endswith((".tmp", ".partial"))
    ]


def files(folder: Path) -> dict[str, Path]:
    """What is compared: everything but pages, pictures, locks and the note of where a run stands."""
    left_out = {"report.html", "study.html", "quality.html", "status.json", "run.lock"}
    return {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in left_out and path.suffix != ".png"
    }


def compare(whole: Path, cut: Path) -> list[str]:
    """Names of files that are missing on one side or differ; times in JSON do not count."""
    a, b = files(whole), files(cut)
    return sorted(
        (a.keys() ^ b.keys()) | {name for name in a.keys() & b.keys() if content(a[name]) != content(b[name])}
    )


def content(path: Path) -> Any:
    """What a file says, times left out."""
    if path.suffix == ".json":
        return untimed(json.loads(path.read_bytes()))
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}
    return path.read_bytes()


def untimed(data: Any) -> Any:
    """JSON data without times."""
    if isinstance(data, dict):
        return {key: untimed(value) for key, value in data.items() if key not in TIMES}
    return [untimed(item) for item in data] if isinstance(data, list) else data


if __name__ == "__main__":
    main()
