"""`graft search`: distill every candidate everywhere, score each alone, choose, and see what the choice does together.

Of the parts of the search only stage 1 takes long, and it is done once a candidate, for all layers in one pass:
operators learn independently, so any mix of them can be put together afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from grafting.analysis.latency import measure_plan
from grafting.console import Console
from grafting.errors import PlanError, RunError
from grafting.families import family_of
from grafting.formats import weights
from grafting.formats.graft_folder import save_graft
from grafting.pipeline import Pipeline
from grafting.plan import GraftPlan, PlanLike, Replace
from grafting.recipes import Recipe
from grafting.runs import RunFolder, environment
from grafting.search.choice import Choice, Option, best_choice, pareto_choices
from grafting.search.damage import Damage
from grafting.surgery import Edit, edited_groups, explain, graft
from grafting.training.config import DistillConfig, FinetuneConfig
from grafting.training.loop import samples_per_pass
from grafting.yaml_io import dump_yaml

VERSION = 1
Cost = Literal["flops", "params", "latency"]
RULES = ("interleaved-50", "interleaved-75", "all")  # what a choice is compared with
_POINTS = 12  # of the curve


@dataclass
class Candidate:
    """One operator, and where it may stand."""

    name: str
    entry: Replace  # with layer numbers
    edits: tuple[Edit, ...]
    savings: dict[str, float] = field(default_factory=dict)  # path -> share of the model's cost
    operators: dict[str, nn.Module] = field(default_factory=dict)  # path -> distilled
    damages: dict[str, float] = field(default_factory=dict)  # path -> of it alone


def search_plan(
    recipe: Recipe, candidates: PlanLike, folder: str | Path, console: Console | None = None, *,
    budget: float | None = None, at_least: int = 0, by: Cost = "flops", num_samples: int = 256, device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Find the plan of least damage among all mixes of `candidates`, at most one operator a site.

    recipe: model, data and the settings of the stages; its own plan is not used. candidates: replace entries; each is
    an operator that may stand in any of its layers (overlaps are what the search is for). budget: the cost afterwards
    as a share of the model's, of the kind `by`. at_least: how many operators are replaced.
    num_samples: noised samples that damage is measured on.

    Writes into `folder`: candidates/NAME, a run folder each (kept and resumed); search.json, search.html; plan.yaml,
    graft/ with the distilled operators of the choice, and recipe.yaml, which goes on from there with stage 2.
    Returns the content of search.json. Raises GraftError.
    """
    folder, console = Path(folder), console or Console(quiet=True)
    if budget is None and not at_least:
        raise PlanError(
            "a search needs an aim: a budget (cost afterwards, as a share) or how many to replace (at_least)"
        )
    if by not in get_args(Cost):
        raise PlanError(f"by={by!r}: expected one of {', '.join(get_args(Cost))}")
    if num_samples < 1:
        raise PlanError(f"num_samples={num_samples}: expected at least 1")
    if recipe.synthesize is not None:
        raise RunError(
            "a search makes no pairs: make them with graft synthesize, and give data=FOLDER, synthesize=null"
        )
    pipeline = Pipeline(_bare(recipe, []), RunFolder(folder, console), device)
    teacher = pipeline.teacher
    if edited_groups(teacher):
        raise PlanError(
            "this model has blocks side by side: search on the model that it was made of, then arrange it"
        )
    found = _candidates(teacher, candidates)
    for candidate in found:
        candidate.savings = pipeline.compute.from_main(_savings(teacher, candidate, by))
    best_choice(
        _options(found), budget=budget, at_least=at_least
    )  # refused before any work, if it can't be met
    for candidate in found:
        _distill(pipeline, candidate, folder / "candidates" / candidate.name, console)
    damage = Damage(
        teacher, pipeline.data, recipe.finetune or FinetuneConfig(), pipeline.compute, num_samples=num_samples,
        at_once=samples_per_pass(recipe.distill or DistillConfig(), pipeline.compute.world), seed=recipe.seed,
    )  # fmt: skip
    for candidate in found:
        console.say(f"[score] {candidate.name}")
        for path, operator in candidate.operators.items():
            candidate.damages[path] = damage.of({path: operator})
    options = _options(found)
    chosen = best_choice(options, budget=budget, at_least=at_least)
    data = {
        "version": VERSION, "recipe": recipe.name, "model": recipe.model, "by": by, "budget": budget,
        "at_least": at_least, "num_layers": family_of(teacher).num_layers(teacher),
        "candidates": [
            {"name": c.name, **c.entry.to_dict(), "sites": [_site(c, edit) for edit in c.edits]} for c in found
        ],
        "chosen": _described(chosen, found, damage) | {"plan": _plan(chosen, found).to_dict()["entries"]},
        "curve": [_described(choice, found, damage) for choice in _curve(options, budget)],
        "rules": _rules(found, damage),
        "protocol": {
            "num_samples": num_samples, "seed": recipe.seed, "data": pipeline.data.name,
            "data_hash": pipeline.data.content_hash, "timesteps": "spread",
        },
        "environment": environment(),
    }  # fmt: skip
    if pipeline.compute.is_main:
        _write(folder, recipe, pipeline, chosen, found, data)
    pipeline.compute.wait()
    return data


# ---- candidates


def _bare(recipe: Recipe, plan: Sequence[Mapping[str, Any]]) -> Recipe:
    """The recipe with another plan, and stage 1 alone."""
    return recipe.model_copy(
        update={"plan": [dict(entry) for entry in plan], "student": None, "finetune": None, "evaluate": None}
    )


def _candidates(model: nn.Module, given: PlanLike) -> list[Candidate]:
    """The candidates with layer numbers, each checked by itself. Raises PlanError, OperatorError."""
    entries = GraftPlan.of(given)
    found: list[Candidate] = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, Replace):
            raise PlanError(f"candidate {number} ({entry}): a search replaces operators; leave it out")
        said = explain(model, GraftPlan([entry]))
        name = f"{number:02d}-{entry.target}-{entry.operator}".replace(".", "-")
        found.append(
            Candidate(name, said.plan.sites[said.edits[0].site.kind, said.edits[0].site.layer], said.edits)
        )
    if not found:
        raise PlanError(
            "a search without candidates: give replace entries, such as mha in all layers with hyena_x"
        )
    return found


def _savings(model: nn.Module, candidate: Candidate, by: Cost) -> dict[str, float]:
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


def _distill(pipeline: Pipeline, candidate: Candidate, path: Path, console: Console) -> None:
    """Stage 1 of a candidate in all of its layers, in a run folder of its own, unless it was done before."""
    recipe = _bare(pipeline.recipe, [candidate.entry.to_dict()])
    compute = pipeline.compute
    learns = recipe.distill is not None and candidate.entry.train
    own = Pipeline(
        recipe, RunFolder(path, writer=False), pipeline.device, _teacher=pipeline.teacher, _data=pipeline.data
    )
    own.check()
    if compute.is_main:
        own.run = RunFolder.create(path, recipe.to_dict(), console, resume=True)
    compute.wait()
    with own.run.writing():
        if compute.from_main(own.run.result("graft") is None):
            own.graft()
        compute.wait()
        if learns and compute.from_main(own.run.result("distill") is None):
            console.say(f"[distill] {candidate.name}")
            own.distill()
        compute.wait()
        student = own.student(share=True).eval()
    candidate.operators = {edit.site.path: student.get_submodule(edit.site.path) for edit in candidate.edits}


def _options(candidates: Sequence[Candidate]) -> list[Option]:
    """Every candidate at every site; damages are 0 before they are measured."""
    return [
        Option(edit.site.path, number, candidate.damages.get(edit.site.path, 0.0), candidate.savings[edit.site.path])
        for number, candidate in enumerate(candidates)
        for edit in candidate.edits
    ]  # fmt: skip


# ---- choices


def _plan(choice: Choice, candidates: Sequence[Candidate]) -> GraftPlan:
    """A choice as a plan with layer numbers."""
    entries = []
    for number, candidate in enumerate(candidates):
        paths = {option.path for option in choice.options if option.candidate == number}
        if layers := tuple(edit.site.layer for edit in candidate.edits if edit.site.path in paths):
            entries.append(replace(candidate.entry, layers=layers))
    return GraftPlan(entries) if entries else GraftPlan.empty()


def _operators(choice: Choice, candidates: Sequence[Candidate]) -> dict[str, nn.Module]:
    return {option.path: candidates[option.candidate].operators[option.path] for option in choice.options}


def _described(choice: Choice, candidates: Sequence[Candidate], damage: Damage) -> dict[str, Any]:
    """damage: the sum of what each does alone; together: what all do at once. layers: by candidate."""
    layers = {
        candidate.name: [e.site.layer for e in candidate.edits if (e.site.path, number) in _taken(choice)]
        for number, candidate in enumerate(candidates)
    }
    return {
        "replaced": len(choice.options), "cost": choice.cost, "damage": choice.damage,
        "together": damage.of(_operators(choice, candidates)), "layers": {k: v for k, v in layers.items() if v},
    }  # fmt: skip


def _taken(choice: Choice) -> set[tuple[str, int]]:
    return {(option.path, option.candidate) for option in choice.options}


def _curve(options: Sequence[Option], budget: float | None) -> list[Choice]:
    """Choices from no edit to the most: by cost where there is a budget, else by the number of operators replaced."""
    if budget is None:
        count = len({option.path for option in options})
        wanted = sorted({round(count * k / _POINTS) for k in range(_POINTS + 1)})
        return [best_choice(options, at_least=number) for number in wanted]
    best = sorted(pareto_choices(options), key=lambda choice: choice.cost)
    low, high = best[0].cost, best[-1].cost
    found: list[Choice] = []
    for place in range(_POINTS + 1):
        limit = low + (high - low) * place / _POINTS
        choice = [c for c in best if c.cost <= limit + 1e-9][-1]
        if choice not in found:
            found.append(choice)
    return found


def _rules(candidates: Sequence[Candidate], damage: Damage) -> list[dict[str, Any]]:
    """What the usual selectors would have done with each candidate, where it may stand in all of their layers."""
    found = []
    for number, candidate in enumerate(candidates):
        paths = {edit.site.layer: edit.site.path for edit in candidate.edits}
        for rule in RULES:
            layers = (
                replace(candidate.entry, layers=rule).resolved(damage.family.num_layers(damage.model)).layers
            )
            if not set(layers) <= set(paths):
                continue
            choice = Choice(tuple(o for o in _options([candidate]) if o.path in {paths[n] for n in layers}))
            choice = Choice(tuple(replace(option, candidate=number) for option in choice.options))
            found.append(
                {"rule": rule, "candidate": candidate.name, **_described(choice, candidates, damage)}
            )
    return found


# ---- what is written


def _site(candidate: Candidate, edit: Edit) -> dict[str, Any]:
    path = edit.site.path
    return {
        "layer": edit.site.layer, "path": path, "damage": candidate.damages[path], "saving": candidate.savings[path]
    }  # fmt: skip


def _write(
    folder: Path, recipe: Recipe, pipeline: Pipeline, chosen: Choice, candidates: Sequence[Candidate],
    data: Mapping[str, Any],
) -> None:  # fmt: skip
    from grafting.report.search import write_search

    plan = _plan(chosen, candidates)
    student = graft(pipeline.teacher, plan, seed=recipe.seed, share=True)
    for path, operator in _operators(chosen, candidates).items():
        student.get_submodule(path).load_state_dict(operator.state_dict())
    save_graft(student, folder / "graft")
    plan.save(folder / "plan.yaml")
    goes_on = recipe.model_copy(
        update={"plan": [], "student": str((folder / "graft").resolve()), "locality": None, "distill": None,
                "name": f"{recipe.name}-searched"}
    )  # fmt: skip
    weights.write_bytes(folder / "recipe.yaml", dump_yaml(goes_on.to_dict()).encode())
    weights.write_json(folder / "search.json", dict(data))
    write_search(folder / "search.html", data)


__all__ = ["Candidate", "search_plan"]
