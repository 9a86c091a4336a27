"""`graft search`: distill every candidate everywhere, score each alone, choose, and see what the choice does together.

Of the parts of the search only stage 1 takes long, and it is done once a candidate, for all layers in one pass:
operators learn independently, so any mix of them can be put together afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from torch import nn

from grafting.console import Console
from grafting.errors import PlanError, RunError
from grafting.families import family_of
from grafting.formats import weights
from grafting.formats.graft_folder import save_graft
from grafting.pipeline import Pipeline
from grafting.plan import GraftPlan, PlanLike
from grafting.recipes import Recipe
from grafting.runs import RunFolder, environment
from grafting.runs.lock import NAME as LOCK
from grafting.runs.lock import FolderLock
from grafting.search.candidates import (
    Candidate,
    Cost,
    bare,
    checked_run,
    distill_candidate,
    find_candidates,
    open_run,
    options_of,
    savings_of,
)
from grafting.search.choice import Choice, Option, best_choice, pareto_choices
from grafting.search.damage import Damage
from grafting.search.scores import Scores
from grafting.surgery import Edit, edited_groups, graft, record_of
from grafting.training.config import DistillConfig, FinetuneConfig
from grafting.training.loop import Clock, samples_per_pass
from grafting.yaml_io import dump_yaml

VERSION = 1
RULES = ("interleaved-50", "interleaved-75", "all")  # what a choice is compared with
POINTS = 12  # of the curve


def search_plan(
    recipe: Recipe, candidates: PlanLike, folder: str | Path, console: Console | None = None, *,
    budget: float | None = None, at_least: int = 0, by: Cost = "flops", num_samples: int = 256, device: str = "cpu",
    resume: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Find the plan of least damage among all mixes of `candidates`, at most one operator a site.

    recipe: model, data and the settings of the stages; its own plan is not used. candidates: replace entries; each is
    an operator that may stand in any of its layers (overlaps are what the search is for). budget: the cost afterwards
    as a share of the model's, of the kind `by`. at_least: how many operators are replaced.
    num_samples: noised samples that damage is measured on. resume: False refuses a folder that holds a search.

    Writes into `folder`: candidates/NAME, a run folder each with its damages (kept and resumed); search.json,
    search.html; plan.yaml, graft/ with the distilled operators of the choice, and recipe.yaml, which goes on from there
    with stage 2.
    Returns the content of search.json. Raises GraftError.
    """
    folder, console = Path(folder), console or Console(quiet=True)
    check_aim(recipe, budget, at_least, by, num_samples)
    pipeline = Pipeline(bare(recipe, []), RunFolder(folder, console), device)
    compute = pipeline.compute
    if compute.is_main:
        check_folder(folder, resume)
    else:
        console = Console(quiet=True)
    teacher = pipeline.teacher
    check_model(teacher)
    found = find_candidates(teacher, candidates, recipe.locality)
    for candidate in found:
        candidate.savings = compute.from_main(savings_of(teacher, candidate, by))
    best_choice(
        options_of(found), budget=budget, at_least=at_least
    )  # refused before any work, if it can't be met
    runs = [checked_run(pipeline, candidate, folder / "candidates" / candidate.name) for candidate in found]
    with _writing(folder, compute.is_main):
        for own in runs:  # all before the first one works: one that can't be gone on with is found at once
            open_run(own, console)
        compute.wait()
        for own, candidate in zip(runs, found, strict=True):
            distill_candidate(own, candidate, console)
        damage = Damage(
            teacher, pipeline.data, _weights(recipe), compute, num_samples=num_samples, seed=recipe.seed,
            at_once=samples_per_pass(recipe.distill or DistillConfig(), compute.world),
        )  # fmt: skip
        _score(found, damage, [own.run.path for own in runs], console)
        options = options_of(found)
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
        if compute.is_main:
            _write(folder, recipe, pipeline, chosen, found, data)
        compute.wait()
    return data


def check_aim(recipe: Recipe, budget: float | None, at_least: int, by: str, num_samples: int) -> None:
    """Refuse what no search can be asked for. Raises PlanError, RunError."""
    if budget is None and not at_least:
        raise PlanError(
            "a search needs an aim: a budget (cost afterwards, as a share) or how many to replace (at_least)"
        )
    if budget is not None and budget >= 1 and not at_least:
        raise PlanError(
            f"a budget of {budget:g} of the cost is met by the model as it is: give a share below 1, such as 0.85, or "
            "how many to replace"
        )
    if by not in get_args(Cost):
        raise PlanError(f"by={by!r}: expected one of {', '.join(get_args(Cost))}")
    if num_samples < 1:
        raise PlanError(f"num_samples={num_samples}: expected at least 1")
    if recipe.synthesize is not None:
        raise RunError(
            "a search makes no pairs: make them with graft synthesize, and give data=FOLDER, synthesize=null"
        )


def check_folder(folder: Path, resume: bool) -> None:
    """Refuse a folder that holds something else, whose graft or recipe would be written over. Raises RunError."""
    where = str(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunError(f"{where!r} is not a folder; give another --out")
    there = {path.name for path in folder.iterdir() if path.name != LOCK and not weights.is_partial(path)}
    if there and ("candidates" not in there or "run.json" in there):
        raise RunError(f"{where!r} is not an empty folder and holds no search; give another --out")
    if there and not resume:
        raise RunError(f"{where!r} already holds a search; go on with --resume, or give another --out")


def check_model(model: nn.Module) -> None:
    """Raise PlanError for an edited model whose operators can't be told from its base's."""
    if edited_groups(model):
        raise PlanError(
            "this model has blocks side by side: search on the model that it was made of, then arrange it"
        )
    record = record_of(model)
    if record is not None and record.base_hash is not None:
        raise PlanError(
            "this model is a graft that has the rest of its weights from its base: search on the model that it was "
            f"made of ({record.source!r})"
        )


@contextmanager
def _writing(folder: Path, writer: bool) -> Iterator[None]:
    """While inside, no other search writes to the folder. Raises RunError, naming the process that does."""
    if not writer:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"can't write {str(folder)!r}: {error.strerror or error}") from None
    with FolderLock(folder):
        weights.clear_partial(folder)
        yield


# ---- scores


def _weights(recipe: Recipe) -> FinetuneConfig:
    """Stage 2, for its weights; without one the label dropout is that of stage 1: a model may have no null class."""
    stage_1 = recipe.distill or DistillConfig()
    return recipe.finetune or FinetuneConfig(label_dropout=stage_1.label_dropout)


def _score(
    candidates: Sequence[Candidate], damage: Damage, folders: Sequence[Path], console: Console
) -> None:
    """Measure every candidate alone at each of its sites, but where that was done before."""
    scores = [Scores(folder, damage.measure, damage.compute) for folder in folders]
    total = sum(len(candidate.operators) for candidate in candidates)
    done = sum(path in s.known for c, s in zip(candidates, scores, strict=True) for path in c.operators)
    clock = Clock(done, total)
    for candidate, known in zip(candidates, scores, strict=True):
        if any(path not in known.known for path in candidate.operators):
            console.say(f"[score] {candidate.name}")
        for path, operator in candidate.operators.items():
            if path not in known.known:
                known.keep(path, damage.of({path: operator}))
                done += 1
                console.progress("score", done, total, f"{candidate.name}, ETA {clock.eta(done)}")
            candidate.damages[path] = known.known[path]


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
        wanted = sorted({round(count * k / POINTS) for k in range(POINTS + 1)})
        return [best_choice(options, at_least=number) for number in wanted]
    best = sorted(pareto_choices(options), key=lambda choice: choice.cost)
    low, high = best[0].cost, best[-1].cost
    found: list[Choice] = []
    for place in range(POINTS + 1):
        limit = low + (high - low) * place / POINTS
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
            try:
                layers = (
                    replace(candidate.entry, layers=rule)
                    .resolved(damage.family.num_layers(damage.model))
                    .layers
                )
            except PlanError:  # it names no layer of so few
                continue
            if not set(layers) <= set(paths):
                continue
            choice = Choice(tuple(o for o in options_of([candidate]) if o.path in {paths[n] for n in layers}))
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


__all__ = ["Candidate", "check_aim", "check_folder", "check_model", "search_plan"]
