"""Fill the disk under a run, make its folder read-only, take it away; see what the run says and what is left.

    python scripts/chaos/disk.py                # as root: each on a small file system of its own (tmpfs)
    python scripts/chaos/disk.py --only full

Three runs of a miniature, each stopped by the disk in the middle of stage 2, after its first checkpoints. Expected of
each: exit status 2, one `error:` line that names a file, no other noise; the checkpoints that were there before load;
and with the disk back, `--resume` ends with the weights of an undisturbed run; where the folder is gone, nothing but
a note of the error (status.json) is put there again. Prints a JSON object; exit status 1 if anything is otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from kill_resume import default_command

SIZE = "64m"
Change = Callable[[Path], None]
SHORT = ("distill.steps=8", "finetune.steps=35", "sample.num=4")
AT_STEP = 14  # of stage 2: a checkpoint every 7


def main() -> None:
    """Run all three, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=sorted(CASES), default=sorted(CASES))
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="disk-chaos-") as scratch:
        folder = Path(scratch)
        command = [*default_command("run", folder), *(part for text in SHORT for part in ("--set", text))]
        whole = folder / "whole"
        run(command, whole).wait()
        for name in options.only:
            disturb, mend = CASES[name]
            disk = folder / name
            disk.mkdir()
            mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk))
            try:
                found[name] = case(command, disk, disturb, mend, weights(whole))
            finally:
                subprocess.run(["umount", "-l", str(disk)], check=False)
    print(json.dumps(found, indent=2))
    raise SystemExit(0 if all(result["as_expected"] for result in found.values()) else 1)


def case(
    command: list[str], disk: Path, disturb: Change, mend: Change | None, expected: set[str]
) -> dict[str, Any]:
    """One run on its own disk; what came of it."""
    from grafting.runs.checkpoints import load_checkpoint

    out = disk / "run"
    process = run(command, out)
    while process.poll() is None and step(out) < AT_STEP:
        time.sleep(0.01)
    before = {path.name: path.read_bytes() for path in (out / "checkpoints" / "finetune").glob("0*.pt")}
    disturb(disk)
    _, text = process.communicate(timeout=300)
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    result: dict[str, Any] = {"exit_status": process.returncode, "said": errors}
    clean = process.returncode == 2 and len(errors) == 1 and "Traceback" not in text
    if mend is None:
        result["left"] = sorted(path.name for path in out.rglob("*") if path.is_file())
        return result | {"as_expected": clean and set(result["left"]) <= {"status.json"}}
    folder = out / "checkpoints" / "finetune"
    state = load_checkpoint(folder, lambda line: None)
    intact = all(
        (folder / name).read_bytes() == content
        for name, content in before.items()
        if (folder / name).exists()
    )
    mend(disk)
    again = run(command, out)
    again.communicate(timeout=300)
    result |= {
        "checkpoint": state["step"] if state else None, "earlier_ones_intact": intact,
        "resumed_exit_status": again.returncode, "resumed_weights_identical": weights(out) == expected,
    }  # fmt: skip
    good = intact and state is not None and again.returncode == 0 and result["resumed_weights_identical"]
    return result | {"as_expected": clean and good}


def run(command: list[str], out: Path) -> subprocess.Popen[str]:
    """The command, or its resumption, in a process of its own."""
    arguments = [str(out) if part == "OUT" else part for part in command]
    return subprocess.Popen(
        [sys.executable, "-m", "grafting", *arguments, "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def step(out: Path) -> int:
    """The last step of stage 2 in the log."""
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines[-3:]]
    except (OSError, ValueError):
        return -1
    return max((r["step"] for r in records if r.get("stage") == "finetune"), default=-1)


def weights(out: Path) -> set[str]:
    """Names of the weight files of a graft: they hold their hashes."""
    return {path.name for path in (out / "graft").glob("*.safetensors")}


def mount(*arguments: str) -> None:
    """`mount`, or the end."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"this script mounts small file systems and has to be root for it: {done.stderr.strip()}"
        )


def fill(disk: Path) -> None:
    """Not a byte is left."""
    with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def empty(disk: Path) -> None:
    """Give it back."""
    (disk / "ballast").unlink()


def lock(disk: Path, how: str) -> None:
    """Folders that not even root may write to (or may again); a mount would stay writable while a file is open."""
    folders = [str(path) for path in [disk / "run", *(disk / "run").rglob("*")] if path.is_dir()]
    subprocess.run(["chattr", how, *folders], check=True)


def take_away(disk: Path) -> None:
    """Remove the run folder, as a clean-up job would, however often something is put there meanwhile."""
    import shutil

    while (disk / "run").exists():
        shutil.rmtree(disk / "run", ignore_errors=True)


CASES: dict[str, tuple[Change, Change | None]] = {
    "full": (fill, empty),
    "read-only": (lambda disk: lock(disk, "+i"), lambda disk: lock(disk, "-i")),
    "gone": (take_away, None),
}  # fmt: skip


if __name__ == "__main__":
    main()
