"""`write_report`: one self-contained page of a run, for a researcher to show a colleague.

It loads nothing, runs nothing (a content policy forbids both) and says of every stage that is missing that it is.
The same run folder gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from grafting.formats.weights import write_bytes
from grafting.report import costs, curves, gallery, sections
from grafting.report.format import mapping
from grafting.report.html import Child, Column, Html, clean, data_table, document, el, escape, note, section
from grafting.report.reading import RunRecord, read_run
from grafting.report.style import CSS
from grafting.report.words import plain

_MAX_RECIPE = 40_000


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder, whole or partial, from what it holds; returns its path.

    Raises RunError (no run folder), CheckpointError (the page can't be written).
    """
    record = read_run(run)
    page = record.folder / "report.html"
    write_bytes(page, render(record).encode("utf-8"))
    return page


def render(run: RunRecord) -> str:
    """The page of a run."""
    parts: list[Callable[[RunRecord], Html]] = [
        sections.headline, gallery.samples, sections.quality, costs.cost, curves.stage_one, curves.stage_two,
        sections.layers, provenance,
    ]  # fmt: skip
    return document(f"{clean(run.name, 80)} – graft report", CSS, [_guarded(part, run) for part in parts])


def _guarded(part: Callable[[RunRecord], Html], run: RunRecord) -> Html:
    """A section, or a sentence that it could not be made: strange content must not cost the rest of the page."""
    try:
        return part(run)
    except Exception as error:
        return note(f"The section '{part.__name__}' could not be made: {type(error).__name__}: {error}")


def provenance(run: RunRecord) -> Html:
    """What was run on what, and how to run it again."""
    return section(
        "provenance", "What was run on what",
        environment_table(mapping(run.state.get("environment"))),
        el("h3", "Run it again"),
        el("pre", el("code", "graft run recipe.yaml --out again")),
        el("p", "with the recipe below, which is the run's own with every default filled in."),
        determinism(mapping(run.state.get("environment"))),
        el("details", el("summary", "The recipe"),
           el("pre", el("code", escape(run.recipe_text or "(the run folder has no recipe.yaml)", _MAX_RECIPE)))),
        _plan(run),
    )  # fmt: skip


def environment_table(found: object) -> Html:
    """Versions and hardware."""
    rows: list[list[Child]] = [
        [str(key).replace("_", " "), plain(value)] for key, value in mapping(found).items()
    ]
    if not rows:
        return note("What it ran on was not recorded.")
    return data_table("Environment, as recorded.", [Column("what", True), Column("value", True)], rows)


def determinism(environment: object) -> Html:
    """What comes out the same when it is run again, and what does not."""
    gpu = mapping(environment).get("gpu")
    where = (
        "This run used a GPU, whose kernels may add in another order each time: expect equal results up to "
        "rounding, not equal bytes."
        if gpu
        else "On the same CPU with the same versions and number of threads, the graft and the samples come out the "
        "same to the byte; another machine, version or thread count changes them by rounding."
    )
    return el(
        "p", "Data order, timesteps, noise, label dropout and new weights are functions of the seed and of the "
        "sample or step number, so a resumed run takes the same draws. ", where,
        " Wall times are never the same twice.",
    )  # fmt: skip


def _plan(run: RunRecord) -> Html | None:
    try:
        text = (run.folder / "plan.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return el(
        "details",
        el("summary", "The plan, with layer numbers"),
        el("pre", el("code", escape(text, _MAX_RECIPE))),
    )
