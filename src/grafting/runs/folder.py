"""The run folder: everything that a run leaves, and what it needs to go on after a stop.

    recipe.yaml plan.yaml run.json graft/ checkpoints/ metrics.jsonl samples/{teacher,student}.npz
    evaluation.json report.html status.json; run.lock while a process writes

`run.json` says which stages are done and with what result. Files appear whole or not at all.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor, nn

from grafting.console import Console
from grafting.errors import CheckpointError, GraftError, Interrupted, RunError
from grafting.evaluation.samples import to_uint8
from grafting.formats import weights
from grafting.formats.graft_folder import is_graft_folder, load_graft, save_graft
from grafting.recipes.settings import FREE_KEYS, differences, upgraded
from grafting.runs import checkpoints
from grafting.runs.lock import NAME as LOCK
from grafting.runs.lock import FolderLock
from grafting.runs.machine import environment
from grafting.runs.metrics import MetricsLog, plain_json
from grafting.runs.status import StatusFile
from grafting.runs.trackers import Trackers
from grafting.yaml_io import dump_yaml, load_yaml

VERSION = 2  # 1: a stage's seed of 0 was the run's
CACHE = "cache"  # stored activations of stage 1, while it runs
_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class RunFolder:
    """One run on disk; the journal of its stages."""

    def __init__(self, path: str | Path, console: Console | None = None, *, writer: bool = True) -> None:
        self.path = Path(path)
        self.writer = writer  # of several processes one writes, all read
        self.console = console if console and writer else Console(quiet=True)
        self._stop: int | None = None
        self._at_once = False  # what is being written is given up
        self._lock = FolderLock(self.path)
        self._depth = 0  # of `writing`
        self._recipe: dict[str, Any] | None = None
        self._status = StatusFile(self.path)
        self._metrics = MetricsLog(self.path / "metrics.jsonl", self._num_steps)
        self._trackers: Trackers | None = None

    # ---- life of the folder

    @classmethod
    def create(
        cls, path: str | Path, recipe: Mapping[str, Any], console: Console, *, resume: bool = False,
        resumable: bool = True,
    ) -> RunFolder:  # fmt: skip
        """A new run, or with `resume` the one that is there if its recipe is the same. Raises RunError.

        resumable: whether the caller could have said `resume`; the error for a run that is there names the remedy.
        This process is then the only one that may write to it, until the first `writing` ends.
        """
        run = cls(path, console)
        if not run._exists():
            run._check_empty()
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"can't write {str(path)!r}: {error.strerror or error}") from None
        run._lock.acquire()
        try:
            run._set_up(json.loads(json.dumps(recipe)), resume, resumable)
        except BaseException:
            run._lock.release()
            raise
        return run

    def _set_up(self, recipe: dict[str, Any], resume: bool, resumable: bool) -> None:
        where = str(self.path)
        if not self._exists():
            self._check_empty()
            weights.write_bytes(self.path / "recipe.yaml", dump_yaml(recipe).encode())
        elif not resume:
            remedy = "go on with --resume" if resumable else "graft distill and finetune go on with it"
            raise RunError(f"{where!r} already holds a run; {remedy}, or give another --out")
        else:
            existing, recipe = self.recipe(), upgraded(recipe, VERSION)
            differing = sorted(set(differences(existing, recipe)) - FREE_KEYS)
            if differing:
                raise RunError(
                    f"{where!r} holds a run of another recipe (different: {', '.join(differing)}); go on with its own, "
                    f"which has what was set at its start (graft run {shlex.quote(f'{where}/recipe.yaml')} --out "
                    f"{shlex.quote(where)} --resume), or give another --out"
                )
            if existing != recipe:
                weights.write_bytes(self.path / "recipe.yaml", dump_yaml(recipe).encode())
        if not (self.path / "run.json").exists():
            self._write({"version": VERSION, "stages": {}, "environment": environment()})

    def check_free(self, *, resume: bool = False) -> None:
        """Raise RunError if a new run (or with `resume` this one) could not be in this folder; writes nothing."""
        if not self._exists():
            self._check_empty()
        elif not resume:
            raise RunError(
                f"{str(self.path)!r} already holds a run; go on with --resume, or give another --out"
            )

    def _exists(self) -> bool:
        return (self.path / "run.json").exists() or (self.path / "recipe.yaml").exists()

    def _check_empty(self) -> None:
        """Raise RunError unless the folder is empty, or holds only what a run leaves that died at its very start."""
        if not self.path.exists():
            return
        if not self.path.is_dir() or any(
            path.name != LOCK and not weights.is_partial(path) for path in self.path.iterdir()
        ):
            raise RunError(f"{str(self.path)!r} is not an empty folder and holds no run; give another --out")

    @contextmanager
    def writing(self, stage: str | None = None) -> Iterator[None]:
        """While inside, this process alone writes to the folder, and status.json says what it does.

        Blocks nest; the outermost takes the lock, clears away what a killed process left half written, and at its
        end gives the lock back and records how it ended. Raises RunError, naming the process that has the lock.
        """
        if not self.writer:
            yield
            return
        if not self._depth:
            self._lock.acquire()
            self._clear_partial()
            self._status.start()
        if stage is not None:
            self._status.begin(stage)
        self._depth += 1
        try:
            yield
        except BaseException as error:
            if self._depth == 1:
                self._status.end(*_ending(error))
            raise
        else:
            if self._depth == 1:
                self._status.end("done")
        finally:
            self._depth -= 1
            if not self._depth and self._trackers is not None:
                self._trackers.close()
            if not self._depth:
                self._lock.release()

    def _clear_partial(self) -> None:
        """Remove files and caches that were never finished; only the holder of the lock makes such."""
        inner = [self.path / name for name in ("graft", "stage-1", "samples")]
        for folder in (self.path, *inner, *self.path.glob("checkpoints/*")):
            weights.clear_partial(folder)
        if (self.path / CACHE).is_dir() and not (self.path / CACHE).is_symlink():
            shutil.rmtree(self.path / CACHE, ignore_errors=True)

    def _num_steps(self, stage: str) -> int | None:
        """How many steps the recipe gives to a stage, if it says so."""
        settings = self._known_recipe().get(stage)
        steps = settings.get("steps") if isinstance(settings, dict) else None
        return steps if isinstance(steps, int) and steps > 0 else None

    def _known_recipe(self) -> dict[str, Any]:
        """The recipe, read once; empty where there is none."""
        if self._recipe is None:
            try:
                self._recipe = self.recipe()
            except GraftError:
                self._recipe = {}
        return self._recipe

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
        """The recipe, as written; that of an older run in today's form."""
        data = load_yaml(self.path / "recipe.yaml", "recipe", RunError)
        if not isinstance(data, dict):
            raise RunError(f"{self.path / 'recipe.yaml'} is not a recipe")
        version = self.read().get("version") if (self.path / "run.json").is_file() else VERSION
        return upgraded(data, version if isinstance(version, int) else VERSION)

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
        with suppress(OSError):
            (self.path / CACHE).rmdir()

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

    def remember(self, what: str, values: Mapping[str, str]) -> list[str]:
        """Record values by name, those that are not known yet; returns the names that are known with another value."""
        state = self.read()
        known = state.setdefault("inputs", {}).get(what, {})
        if self.writer and values.keys() - known.keys():
            state["inputs"][what] = {**values, **known}
            self._write(state)
        return sorted(name for name, value in values.items() if known.get(name, value) != value)

    def _write(self, state: Mapping[str, Any]) -> None:
        weights.write_json(self.path / "run.json", plain_json(state))

    # ---- the student

    def save_student(self, model: nn.Module) -> None:
        """Write graft/."""
        if not self.writer:
            return
        save_graft(model, self.path / "graft")

    def load_student(self, base: nn.Module | None, share: bool = False) -> nn.Module:
        """Read graft/; `share`: what the graft left as it was is not copied from the base."""
        if not is_graft_folder(self.path / "graft"):
            raise RunError(f"{str(self.path)!r} has no graft/ yet; make it with `graft apply` or `graft run`")
        return load_graft(self.path / "graft", base=base, share=share)

    # ---- journal of a stage

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self.writer:
            self._metrics.append(record)
            self._track(record)

    def _track(self, record: Mapping[str, Any]) -> None:
        if self._trackers is None:
            recipe = self._known_recipe()
            names = recipe.get("trackers") or ()
            known = [str(name) for name in names] if isinstance(names, (list, tuple)) else []
            self._trackers = Trackers(known, self.path, recipe, self.console.say)
        if self._trackers.names:
            self._trackers.log(record)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; a torn last line is left out."""
        return self._metrics.read()

    def progress(self, stage: str, step: int, total: int, text: str) -> None:
        """Say where a stage stands, on the console and in status.json."""
        if self.writer:
            self._status.progress(stage, step, total, text)
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

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether this process writes them."""
        return self.writer

    def save_checkpoint(self, stage: str, step: int, state: Mapping[str, Any], keep: int) -> None:
        """Write `checkpoints/<stage>/<step>.pt` and its manifest; remove all but the newest `keep` and the best.

        The best is that of lowest held-out loss, where the state has one (`validation`: step -> loss).
        Raises RunError, CheckpointError.
        """
        if not self.writer:
            return
        if not self.path.is_dir():
            raise RunError(f"the run folder {str(self.path)!r} is gone: it was there when the run began")
        found = state.get("validation")
        score = found.get(step) if isinstance(found, Mapping) else None
        score = score if isinstance(score, float) and math.isfinite(score) else None
        checkpoints.save_checkpoint(
            self.path / "checkpoints" / stage, step, state, keep, score, given_up=lambda: self._at_once
        )

    def load_checkpoint(self, stage: str, step: int | None = None) -> dict[str, Any] | None:
        """The newest whole checkpoint of a stage; a damaged one is named and the one before is used.

        step: that of this step, which the first process has checked. The tensors are pages of the file: copy what is
        kept. Lines of metrics.jsonl that lie after it are dropped: the resumed stage writes them again.
        """
        folder = self.path / "checkpoints" / stage
        if step is not None:
            return checkpoints.read_checkpoint(folder, step)
        state = checkpoints.load_checkpoint(folder, self.console.say)
        step = state["step"] if state is not None else -1
        if self.writer:
            self._metrics.drop(stage, after=step)
            if self._lock.held:
                self._status.begin(stage, max(0, step))
        return state

    def stop_requested(self) -> int | None:
        """The exit status that a signal asked for, or None."""
        return self._stop

    def scratch(self) -> Path:
        """A folder for what a stage stores while it runs; the next process clears away what a killed one left there."""
        folder = self.path / CACHE
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"can't write {str(folder)!r}: {error.strerror or error}") from None
        return folder

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """While inside, the first SIGINT or SIGTERM asks stages to checkpoint and stop; the second ends at once."""

        def request(number: int, frame: FrameType | None) -> None:
            if self._stop is not None:
                self._at_once = True
                raise KeyboardInterrupt
            self._stop = _EXIT_CODES[signal.Signals(number)]
            self.console.say("stopping after this step; press again to stop at once")

        previous = {number: signal.signal(number, request) for number in _EXIT_CODES}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _ending(error: BaseException) -> tuple[str, str | None]:
    """How a run ended by an exception: state and text for status.json."""
    if isinstance(error, Interrupted):
        return "stopped", str(error)
    if not isinstance(error, Exception):  # Ctrl-C twice, SIGTERM outside of training
        return "stopped", "interrupted" if isinstance(error, KeyboardInterrupt) else "terminated"
    text = " ".join(str(error).split())
    return "failed", text if isinstance(error, GraftError) else f"{type(error).__name__}: {text}"
