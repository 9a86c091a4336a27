"""`run_rows`: all rows of a study, in one process or in several at once.

A row is a run folder under `rows/`, locked while it is worked on. Finished rows are never run again; a row that fails
is reported and the others go on; a row that diverges has that as its result.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from grafting import processes
from grafting.console import Console
from grafting.errors import GraftError, Interrupted, InUseError, RunError
from grafting.formats import weights
from grafting.recipes.rows import Row, Study, UnavailableError, check_stated
from grafting.report.study import write_study
from grafting.runs import FolderLock
from grafting.studies.collect import collect
from grafting.studies.rehearsal import rehearse_rows
from grafting.studies.row_run import Setting, check_row, run_row
from grafting.studies.share import Launch, alone_in, is_at_work, take
from grafting.studies.sources import check_sources

_PATIENCE = 600.0  # seconds to wait for another process that writes the page


def run_rows(
    study: Study, folder: Path, console: Console, *, model: str | None = None, seed: int = 0,
    only: list[str] | None = None, device: str = "cpu", changes: list[str] | None = None, jobs: int = 1,
    reuse: Sequence[Path] = (),
) -> Path:  # fmt: skip
    """Run the rows that are not done yet and write study.json, study.html; returns the page.

    only: names of rows. changes: settings for all rows. jobs: rows at a time, each in a process of its own with its
    share of the threads and, of several GPUs, one. reuse: folders of other studies whose equal rows and distilled
    operators are taken over. Of several processes of one launch each does rows for itself; they form no group.
    Raises RunError when every other row is done, if a row failed; of several processes of a launch, the last to end.
    """
    folder = Path(folder)
    setting, rows = _wanted(
        study, folder, only, jobs, model=model, seed=seed, device=device, changes=changes, reuse=reuse
    )
    check_sources(setting, rows)
    for row in study.rows:  # all, so that the table has one protocol whatever --only names
        with contextlib.suppress(UnavailableError):
            check_row(setting, row)
    for row in rows:
        _failure_file(folder, row).unlink(missing_ok=True)
        _unavailable(setting, row).unlink(missing_ok=True)
    launch = Launch.here()
    launch.begin(folder)
    try:
        with processes.alone():  # before anything that would take the launch's other processes for partners
            if jobs == 1:
                spread = launch.world > 1
                _work(setting.on(launch.local_rank) if spread else setting, rows, console)
            else:
                _work_in_processes(setting, rows, jobs, launch)
    finally:
        page = _page(setting)
    if launch.world > 1 and (left := [row.name for row in rows if not _is_settled(setting, row)]):
        console.say(f"other processes of this launch are at {', '.join(left)}; the last one says what failed")
        return page  # a bad exit status would make some launchers end them
    if all(_is_settled(setting, row) for row in rows) and not any(
        is_at_work(setting.row_folder(row.name)) for row in study.rows
    ):
        shutil.rmtree(setting.answers, ignore_errors=True)
    failed = [row.name for row in rows if _failure_file(folder, row).is_file()]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(rows)} rows of study {study.name!r} failed ({', '.join(failed)}); why is in "
            f"{folder / 'failures'} and on {page}; the same command with --resume tries them again"
        )
    return page


def dry_rows(
    study: Study, folder: Path, *, model: str | None = None, seed: int = 0, only: list[str] | None = None,
    device: str = "cpu", changes: list[str] | None = None, jobs: int = 1, reuse: Sequence[Path] = (),
) -> dict[str, Any]:  # fmt: skip
    """What `run_rows` would do, as `rehearse_rows` says it; writes nothing."""
    setting, rows = _wanted(
        study, Path(folder), only, jobs, model=model, seed=seed, device=device, changes=changes, reuse=reuse
    )
    return rehearse_rows(setting, rows, jobs)


def _wanted(
    study: Study, folder: Path, only: Sequence[str] | None, jobs: int, *, reuse: Sequence[Path], **given: Any
) -> tuple[Setting, list[Row]]:
    """The rows that are to be done, in their order, and what they share. Raises RunError."""
    rows = sorted([study.row(name) for name in only] if only else study.rows, key=lambda row: row.rank)
    setting = Setting.of(study, folder, reuse=reuse, wanted=rows, **given)
    if not 1 <= jobs <= 256:
        raise RunError(f"--jobs {jobs}: expected 1 to 256 rows at a time")
    for other in reuse:
        if not (other / "shared").is_dir():
            raise RunError(f"--reuse {str(other)!r}: no folder of a study (it has no shared/)")
    check_stated(study, rows, setting.given)
    return setting, rows


def _page(setting: Setting) -> Path:
    """Write study.json and study.html. One process at a time: of those that end together the last has read all."""
    with alone_in(setting.folder / "shared", patience=_PATIENCE):
        return write_study(setting.folder, collect(setting))


def _is_settled(setting: Setting, row: Row) -> bool:
    """Whether a row is done, failed, or can't be run."""
    files = (setting.result_file(row.name), _failure_file(setting.folder, row), _unavailable(setting, row))
    return any(file.is_file() for file in files)


def _work(setting: Setting, rows: list[Row], console: Console) -> None:
    """Do every row that is not done and that no other process does, again while rows become possible."""
    take(setting.device)
    waiting = list(rows)
    while waiting:
        later = []
        for row in waiting:
            if setting.result_file(row.name).is_file() or _failure_file(setting.folder, row).is_file():
                continue
            folder = setting.row_folder(row.name)
            folder.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(folder)
            try:
                lock.acquire()
            except InUseError as error:  # another process is at it
                console.say(f"left to another process: {error}")
                continue
            try:
                weights.clear_partial(folder)
                if not setting.result_file(row.name).is_file() and not _do(setting, row, console):
                    later.append(row)
            finally:
                lock.release()
        if len(later) == len(waiting) or not later:
            return
        waiting = later


def _do(setting: Setting, row: Row, console: Console) -> bool:
    """One row; False if it can't be run yet (or at all) with what there is."""
    console.say(f"== {row.name}: {row.label}")
    unavailable = _unavailable(setting, row)
    unavailable.unlink(missing_ok=True)
    try:
        result = run_row(setting, row, console)
    except Interrupted:
        raise
    except UnavailableError as error:
        console.say(f"row {row.name} is left out: {error}")
        weights.write_json(unavailable, {"why": str(error)})
        return False
    except Exception as error:
        if isinstance(error, GraftError):
            said: dict[str, Any] = {"error": str(error)}
        else:  # a defect, or the machine: the other rows need not suffer
            said = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        console.say(f"row {row.name} failed: {said['error']}")
        weights.write_json(_failure_file(setting.folder, row), said)
        return True
    weights.write_json(setting.result_file(row.name), result)
    metrics = ", ".join(f"{name} {value:.3g}" for name, value in result["metrics"].items())
    how = f"taken over from {taken}" if (taken := result.get("taken_from")) else "done"
    console.say(f"== {row.name} {how}: {metrics or 'diverged'}")
    return True


def _failure_file(folder: Path, row: Row) -> Path:
    return folder / "failures" / f"{row.name}.json"


def _unavailable(setting: Setting, row: Row) -> Path:
    return setting.folder / "unavailable" / f"{row.name}.json"


# ---- several processes


def _work_in_processes(setting: Setting, rows: list[Row], jobs: int, launch: Launch) -> None:
    """`jobs` workers, which share out the rows by their locks. A stop is passed on to them once, then waited for.

    Each has a GPU of its own, as far as there are so many, and a log of its own, also among those of a launch.
    """
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    workers = [
        context.Process(
            target=_worker, name=f"row worker {launch.rank * jobs + number + 1}",
            args=(setting.on(launch.local_rank * jobs + number), rows, threads, launch.rank * jobs + number + 1),
        )
        for number in range(jobs)
    ]  # fmt: skip
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except BaseException:
        _pass_on(workers)
        raise
    codes = [worker.exitcode or 0 for worker in workers]
    if (stopped := next((code for code in codes if code in (130, 143)), None)) is not None:
        raise Interrupted(stopped, 0)
    if any(codes):
        raise RunError(
            f"a worker of the study ended with status {next(code for code in codes if code)}; "
            f"its log is in {setting.folder / 'logs'}; the same command with --resume goes on"
        )


def _pass_on(workers: Sequence[Any]) -> None:
    while any(worker.is_alive() for worker in workers):
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
        try:
            for worker in workers:
                worker.join()
        except BaseException:  # asked a second time: they are told a second time, which ends them at once
            continue


def _worker(setting: Setting, rows: list[Row], threads: int, number: int) -> None:
    """One process: its remarks go to stderr and, with its progress, to a log."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C reaches the parent, which passes it on
    signal.signal(signal.SIGTERM, _exit)
    torch.set_num_threads(threads)
    log = setting.folder / "logs" / f"worker-{number}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        try:
            _work(setting, rows, _WorkerConsole(stream, number))
        except Interrupted as stop:
            raise SystemExit(stop.code) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None


def _exit(number: int, frame: Any) -> None:
    raise SystemExit(143)


class _WorkerConsole(Console):
    """A console that writes to a log; headings are said on stderr too."""

    def __init__(self, stream: Any, number: int) -> None:
        super().__init__(stream)
        self._outer = Console()
        self._number = number

    def say(self, text: str) -> None:
        super().say(text)
        if text.startswith(("==", "row ", "warning")):
            self._outer.say(f"[{self._number}] {text}")
