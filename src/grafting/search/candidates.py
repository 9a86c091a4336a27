"""The candidates of a search: where each may stand, what it saves there, and its stage 1.

Stage 1 is done once a candidate, for all of its layers in one pass: operators learn independently, so any mix of them
can be put together afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from grafting.analysis.latency import measure_plan
from grafting.console import Console
from grafting.errors import PlanError
from grafting.families import family_of
from grafting.pipeline import Pipeline
from grafting.plan import GraftPlan, PlanLike, Replace
from grafting.recipes import Recipe
from grafting.runs import RunFolder
from grafting.search.choice import Option
from grafting.selectors import Locality
from grafting.surgery import Edit, explain

Cost = Literal["flops", "params", "latency"]


@dataclass
class Candidate:
    """One operator, and where it may stand."""

    name: str
    entry: Replace  # with layer numbers
    edits: tuple[Edit, ...]
    savings: dict[str, float] = field(default_factory=dict)  # path -> share of the model's cost
    operators: dict[str, nn.Module] = field(default_factory=dict)  # path -> distilled
    damages: dict[str, float] = field(default_factory=dict)  # path -> of it alone


def bare(recipe: Recipe, plan: Sequence[Mapping[str, Any]]) -> Recipe:
    """The recipe with another plan, and stage 1 alone."""
    return recipe.model_copy(
        update={"plan": [dict(entry) for entry in plan], "student": None, "finetune": None, "evaluate": None}
    )


def find_candidates(model: nn.Module, given: PlanLike, locality: Locality | None = None) -> list[Candidate]:
    """The candidates with layer numbers, each checked by itself. Raises PlanError, OperatorError."""
    entries = GraftPlan.of(given)
    found: list[Candidate] = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, Replace):
            raise PlanError(f"candidate {number} ({entry}): a search replaces operators; leave it out")
        said = explain(model, GraftPlan([entry]), locality)
        name = f"{number:02d}-{entry.target}-{entry.operator}".replace(".", "-")
        found.append(
            Candidate(name, said.plan.sites[said.edits[0].site.kind, said.edits[0].site.layer], said.edits)
        )
    if not found:
        raise PlanError(
            "a search without candidates: give replace entries, such as mha in all layers with hyena_x"
        )
    return found


def savings_of(model: nn.Module, candidate: Candidate, by: Cost) -> dict[str, float]:
    """path -> the share of the model's cost that the candidate saves there."""
    if by == "latency":
        timed = measure_plan(model, GraftPlan([candidate.entry]))
        before, after = timed["operators"][0]["layer_ms"]
        return dict.fromkeys(
            (e.site.path for e in candidate.edits), (before - after) / timed["latency_ms"][0]
        )
    if by == "params":
        total = sum(p.numel() for p in model.parameters())
        return {e.site.path: (e.before.params - e.after.params) / total for e in candidate.edits}
    flops = family_of(model).flops_per_image(model)
    return {e.site.path: (e.before.total - e.after.total) / flops for e in candidate.edits}


def options_of(candidates: Sequence[Candidate]) -> list[Option]:
    """Every candidate at every site; damages are 0 before they are measured."""
    return [
        Option(edit.site.path, number, candidate.damages.get(edit.site.path, 0.0), candidate.savings[edit.site.path])
        for number, candidate in enumerate(candidates)
        for edit in candidate.edits
    ]  # fmt: skip


# ---- stage 1


def checked_run(pipeline: Pipeline, candidate: Candidate, path: Path) -> Pipeline:
    """The pipeline of a candidate's own run folder, which is not made yet. Raises GraftError."""
    own = Pipeline(
        bare(pipeline.recipe, [candidate.entry.to_dict()]), RunFolder(path, writer=False), pipeline.device,
        _teacher=pipeline.teacher, _data=pipeline.data,
    )  # fmt: skip
    own.check()
    return own


def open_run(own: Pipeline, console: Console) -> None:
    """Make the run folder, or take the one that is there. Raises RunError (it is of another recipe)."""
    if own.compute.is_main:
        own.run = RunFolder.create(own.run.path, own.recipe.to_dict(), console, resume=True)


def distill_candidate(own: Pipeline, candidate: Candidate, console: Console) -> None:
    """Stage 1 of a candidate in all of its layers, unless it was done before."""
    compute = own.compute
    learns = own.recipe.distill is not None and candidate.entry.train
    with own.run.writing():
        if compute.from_main(own.run.result("graft") is None):
            own.graft()
        compute.wait()
        if learns:  # also where it is done: damages are measured on the data that operators learnt from
            own.run.bind("data", own.data.name, own.data.content_hash)
        if learns and compute.from_main(own.run.result("distill") is None):
            console.say(f"[distill] {candidate.name}")
            own.distill()
        compute.wait()
        student = own.student(share=True).eval()
    candidate.operators = {edit.site.path: student.get_submodule(edit.site.path) for edit in candidate.edits}


__all__ = [
    "Candidate", "Cost", "bare", "checked_run", "distill_candidate", "find_candidates", "open_run", "options_of",
    "savings_of",
]  # fmt: skip
