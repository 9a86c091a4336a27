"""The run folder: everything that a run leaves, and what it needs to go on after a stop.

    recipe.yaml plan.yaml run.json graft/ checkpoints/ metrics.jsonl samples/{teacher,student}.npz
    evaluation.json report.html

`run.json` says which stages are done and with what result. Files appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from grafting.console import Console
from grafting.errors import CheckpointError, GraftError, RunError
from grafting.evaluation.samples import to_uint8
from grafting.formats import weights
from grafting.formats.graft_folder import is_graft_folder, load_graft, save_graft
from grafting.yaml_io import dump_yaml, load_yaml

VERSION = 1
_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class RunFolder:
    """One run on disk; the journal of its stages."""

    def __init__(self, path: str | Path, console: Console | None = None, *, writer: bool = True) -> None:
        self.path = Path(path)
        self.writer = writer  # of several processes one writes, all read
        self.console = console if console and writer else Console(quiet=True)
        self._stop: int | None = None

    # ---- life of the folder

    @classmethod
    def create(
        cls, path: str | Path, recipe: Mapping[str, Any], console: Console, *, resume: bool = False
    ) -> RunFolder:
        """A new run, or with `resume` the one that is there if its recipe is the same. Raises RunError."""
        run = cls(path, console)
        recipe = json.loads(json.dumps(recipe))
        if (run.path / "run.json").exists() or (run.path / "recipe.yaml").exists():
            existing = load_yaml(run.path / "recipe.yaml", "recipe", RunError)
            if not resume:
                raise RunError(
                    f"{str(run.path)!r} already holds a run; go on with --resume, or give another --out"
                )
            if existing != recipe:
                differing = sorted(k for k in {*existing, *recipe} if existing.get(k) != recipe.get(k))
                raise RunError(
                    f"{str(run.path)!r} holds a run of another recipe (different: {', '.join(differing)}); "
                    "give another --out"
                )
            if not (run.path / "run.json").exists():  # stopped between the two files
                run._write({"version": VERSION, "stages": {}, "environment": environment()})
            return run
        if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
            raise RunError(f"{str(run.path)!r} is not an empty folder and holds no run; give another --out")
        weights.write_bytes(run.path / "recipe.yaml", dump_yaml(recipe).encode())
        run._write({"version": VERSION, "stages": {}, "environment": environment()})
        return run

    @classmethod
    def open(cls, path: str | Path, console: Console | None = None) -> RunFolder:
        """An existing run. Raises RunError."""
        run = cls(path, console)
        if not (run.path / "run.json").is_file():
            raise RunError(
                f"{str(path)!r} is not a run folder: it has no run.json; make one with `graft apply` or `graft run`"
            )
        run.read()
        return run

    def read(self) -> dict[str, Any]:
        """The content of run.json."""
        try:
            state = weights.read_json(self.path / "run.json", "run")
        except CheckpointError as error:
            raise RunError(str(error)) from None
        if not isinstance(state.get("stages"), dict):
            raise RunError(f"{self.path / 'run.json'} does not describe a run")
        return state

    def recipe(self) -> dict[str, Any]:
        """The recipe, as written."""
        data = load_yaml(self.path / "recipe.yaml", "recipe", RunError)
        if not isinstance(data, dict):
            raise RunError(f"{self.path / 'recipe.yaml'} is not a recipe")
        return data

    def result(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage recorded, or None."""
        return self.read()["stages"].get(stage)

    def finish(self, stage: str, result: Mapping[str, Any]) -> None:
        """Record that a stage is done; its checkpoints are no longer needed."""
        if not self.writer:
            return
        state = self.read()
        state["stages"][stage] = dict(result)
        self._write(state)
        shutil.rmtree(self.path / "checkpoints" / stage, ignore_errors=True)

    def bind(self, what: str, name: str, sha256: str) -> None:
        """Record what this run works on, by hash; on a later call, refuse anything else. Raises RunError."""
        state = self.read()
        known = state.setdefault("inputs", {}).get(what)
        if known is None:
            state["inputs"][what] = {"name": name, "sha256": sha256}
            if self.writer:
                self._write(state)
        elif known.get("sha256") != sha256:
            raise RunError(
                f"{str(self.path)!r}: the {what} {name!r} is no longer what this run began with (its content has "
                "changed); restore it, or give another --out"
            )

    def _write(self, state: Mapping[str, Any]) -> None:
        weights.write_json(self.path / "run.json", _plain(state))

    # ---- the student

    def save_student(self, model: nn.Module) -> None:
        """Write graft/."""
        if not self.writer:
            return
        save_graft(model, self.path / "graft")

    def load_student(self, base: nn.Module | None) -> nn.Module:
        """Read graft/."""
        if not is_graft_folder(self.path / "graft"):
            raise RunError(f"{str(self.path)!r} has no graft/ yet; make it with `graft apply` or `graft run`")
        return load_graft(self.path / "graft", base=base)

    # ---- journal of a stage

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if not self.writer:
            return
        try:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(_plain(record)) + "\n")
        except OSError as error:
            raise RunError(f"can't write {self.path / 'metrics.jsonl'}: {error.strerror}") from None

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; a torn last line is left out."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        found = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def progress(self, stage: str, step: int, total: int, text: str) -> None:
        self.console.progress(stage, step, total, text)

    def preview(self, stage: str, step: int, samples: Tensor) -> None:
        """Write `samples/<stage>-<step>.png`: samples [N, C, H, W] of a student in training, side by side."""
        if not self.writer:
            return
        from grafting.generation import save_grid

        channels = samples.shape[1]
        pixels = (
            samples if channels in (1, 3) else samples[:, :3] / 3
        )  # latents: their first channels, as colours
        (self.path / "samples").mkdir(exist_ok=True)
        save_grid(to_uint8(pixels), self.path / "samples" / f"{stage}-{step:06d}.png")

    def save_checkpoint(self, stage: str, step: int, state: Mapping[str, Any], keep: int) -> None:
        """Write `checkpoints/<stage>/<step>.pt` and its hash; remove all but the newest `keep`."""
        if not self.writer:
            return
        folder = self.path / "checkpoints" / stage
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getbuffer()
        path = folder / f"{step:09d}.pt"
        weights.write_bytes(path, content)
        weights.write_json(
            path.with_suffix(".json"), {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        )
        for old in sorted(folder.glob("*.pt"))[: -max(1, keep)]:
            old.with_suffix(".json").unlink(missing_ok=True)
            old.unlink(missing_ok=True)

    def load_checkpoint(self, stage: str) -> dict[str, Any] | None:
        """The newest whole checkpoint of a stage; a damaged one is named and the one before is used.

        Lines of metrics.jsonl that lie after it are dropped: the resumed stage writes them again.
        """
        for path in sorted((self.path / "checkpoints" / stage).glob("*.pt"), reverse=True):
            manifest = path.with_suffix(".json")
            try:
                expected = weights.read_json(manifest, "checkpoint manifest")
                content = path.read_bytes()
                if (
                    len(content) != expected["size"]
                    or hashlib.sha256(content).hexdigest() != expected["sha256"]
                ):
                    raise CheckpointError(f"checkpoint {path} is damaged: its hash is not the recorded one")
                state = weights.read_pickled(path)
            except (GraftError, OSError, KeyError) as error:
                self.console.say(f"warning: {error}; using the checkpoint before it")
                continue
            self._drop_metrics(stage, after=state["step"])
            return state
        self._drop_metrics(stage, after=-1)
        return None

    def _drop_metrics(self, stage: str, after: int) -> None:
        if not self.writer:
            return
        records = self.metrics()
        kept = [r for r in records if r.get("stage") != stage or r.get("step", 0) <= after]
        if len(kept) != len(records):
            text = "".join(json.dumps(record) + "\n" for record in kept)
            weights.write_bytes(self.path / "metrics.jsonl", text.encode())

    def stop_requested(self) -> int | None:
        """The exit status that a signal asked for, or None."""
        return self._stop

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """While inside, the first SIGINT or SIGTERM asks stages to checkpoint and stop; the second ends at once."""

        def request(number: int, frame: FrameType | None) -> None:
            if self._stop is not None:
                raise KeyboardInterrupt
            self._stop = _EXIT_CODES[signal.Signals(number)]
            self.console.say("stopping after this step; press again to stop at once")

        previous = {number: signal.signal(number, request) for number in _EXIT_CODES}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def environment() -> dict[str, Any]:
    """What the run computes on: versions, processor or GPU, threads."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from grafting import __version__

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    found["grafting"] = __version__
    for name in ("diffusers", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["platform"] = f"{platform.system()} {platform.machine()}"
    found["cpu_count"] = os.cpu_count()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def _plain(value: Any) -> Any:
    """JSON types; non-finite floats become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
