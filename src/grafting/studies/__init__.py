"""`graft study NAME`: sets of experiments, resumable, each ending in one JSON and one page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from grafting.console import Console
from grafting.errors import RunError
from grafting.recipes import EXPERIMENTS
from grafting.recipes.depth import DEPTH_TO_WIDTH
from grafting.recipes.rows import Claim, Row, Study, UnavailableError
from grafting.recipes.study_file import load_study
from grafting.selectors import closest
from grafting.studies.ablation import DEMO_ABLATION
from grafting.studies.donor_init import NAME as DONOR_INIT
from grafting.studies.donor_init import run_donor_init
from grafting.studies.runner import dry_rows, run_rows
from grafting.studies.share import Launch

STUDIES: dict[str, Study] = {
    **EXPERIMENTS,
    DEMO_ABLATION.name: DEMO_ABLATION,
    DEPTH_TO_WIDTH.name: DEPTH_TO_WIDTH,
}
NAMES = (*STUDIES, DONOR_INIT)


def run_study(
    name: str, out: str | Path, console: Console, *, model: str | None = None, resume: bool = False, seed: int = 0,
    only: list[str] | None = None, device: str = "cpu", changes: list[str] | None = None, jobs: int = 1,
    reuse: Sequence[Path] = (),
) -> Path:  # fmt: skip
    """Run what is not done yet of a study in folder `out`; returns its page. name: or the file of a study.

    Raises RunError.
    """
    study = _study(name, NAMES)
    folder, launch = Path(out), Launch.here()
    _check_free(folder, launch, resume)
    if study is None:
        if only or reuse or jobs != 1:
            raise RunError(f"study {name!r} has no rows of its own: leave out --only, --jobs and --reuse")
        if launch.world > 1:
            raise RunError(
                f"study {name!r} is one job after another in one process, and this is one of {launch.world} that were "
                "started together: start one"
            )
        return run_donor_init(folder, console, model=model, seed=seed, device=device, changes=changes)
    return run_rows(
        study, folder, console, model=model, seed=seed, only=only, device=device, changes=changes, jobs=jobs,
        reuse=reuse,
    )  # fmt: skip


def rehearse_study(
    name: str, out: str | Path, *, model: str | None = None, resume: bool = False, seed: int = 0,
    only: list[str] | None = None, device: str = "cpu", changes: list[str] | None = None, jobs: int = 1,
    reuse: Sequence[Path] = (),
) -> dict[str, Any]:  # fmt: skip
    """What `run_study` would do, how long that would take and what is missing; writes nothing. Raises GraftError."""
    study = _study(name, STUDIES)
    if study is None:
        raise RunError(f"study {name!r} has no rows to look at: expected one of {', '.join(STUDIES)}")
    _check_free(Path(out), Launch.here(), resume)
    return dry_rows(
        study, Path(out), model=model, seed=seed, only=only, device=device, changes=changes, jobs=jobs,
        reuse=reuse,
    )  # fmt: skip


def _study(name: str, known: Iterable[str]) -> Study | None:
    """A study by name or file; None for `donor-init`, which has no rows of its own. Raises RunError."""
    if name == DONOR_INIT:
        return None
    if name in STUDIES:
        return STUDIES[name]
    if Path(name).is_file():
        return load_study(name)
    raise RunError(
        f"unknown study {name!r}{closest(name, list(known))}: expected one of {', '.join(known)}, or the file of a "
        "study of your own"
    )


def _check_free(folder: Path, launch: Launch, resume: bool) -> None:
    if not resume and not launch.may_begin(folder):
        raise RunError(f"{str(folder)!r} already holds a study; go on with --resume, or give another --out")


__all__ = [
    "NAMES",
    "STUDIES",
    "Claim",
    "Row",
    "Study",
    "UnavailableError",
    "load_study",
    "rehearse_study",
    "run_rows",
    "run_study",
]
