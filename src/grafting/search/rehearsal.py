"""`graft search --dry-run`: what would be distilled and measured, how long, whether the aim can be met. Does nothing.

Works without weights, like `graft run --dry-run`: what a candidate saves in FLOPs or parameters is counted, and times
are put together from operators timed alone on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grafting.analysis import estimate, pace
from grafting.analysis.headroom import total_bytes
from grafting.analysis.latency import device_name
from grafting.analysis.memory import gigabytes
from grafting.families import family_of
from grafting.needs import remedies, stage_memory
from grafting.pipeline import Pipeline
from grafting.plan import GraftPlan, PlanLike
from grafting.recipes import Recipe
from grafting.rehearsal import check_inputs, in_time, teacher_of
from grafting.report.search import COSTS
from grafting.runs import RunFolder
from grafting.search.candidates import Candidate, Cost, bare, find_candidates, options_of, savings_of
from grafting.search.choice import best_choice, pareto_choices
from grafting.search.run import POINTS, RULES, check_aim, check_folder, check_model
from grafting.surgery import graft
from grafting.training.compute import make_compute
from grafting.training.config import DistillConfig
from grafting.training.loop import samples_per_pass


def rehearse_search(
    recipe: Recipe, candidates: PlanLike, folder: str | Path, *, budget: float | None = None, at_least: int = 0,
    by: Cost = "flops", num_samples: int = 256, device: str = "cpu", resume: bool = True, processes: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """What `search_plan` would do with the same arguments, in JSON types.

    {"candidates": [{"name", "replace", "layers", "savings": [share of the cost saved at each], "done": whether it is
    distilled, "seconds", "memory": {part: bytes}, "remedy"}], "least_cost": the least share that the candidates can
    bring the cost to (None for latency, which only a search measures), "passes": how often the model is measured,
    "score_seconds", "missing", "device", "notes"}. What was measured before is not taken off `passes`.
    Raises GraftError for what the search would refuse.
    """
    check_aim(recipe, budget, at_least, by, num_samples)
    check_folder(Path(folder), resume)
    missing: list[str] = []
    notes: list[str] = []
    pipeline = Pipeline(bare(recipe, []), RunFolder(folder, writer=False), device)
    teacher = teacher_of(pipeline, missing)
    check_model(teacher)
    found = find_candidates(teacher, candidates, recipe.locality)
    check_inputs(pipeline, teacher, missing)
    least = _least_cost(teacher, found, by, budget, at_least)
    if by == "latency":
        notes.append(
            "what a candidate saves in latency is measured by the search: whether its budget can be met"
        )
    place = torch.device(pipeline.device)
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else next(teacher.parameters()).dtype
    model = nn.Module.to(estimate.meta_copy(teacher), dtype=dtype)
    size = samples_per_pass(recipe.distill or DistillConfig(), processes)
    whole = pace.Stopwatch(place, "fp32", dtype, size)  # damage is measured without autocast
    passes = 1 + sum(len(candidate.edits) for candidate in found) + _choices(found)
    rows: list[dict[str, Any]] = []
    score: float | None = None
    try:
        rows = _rows(recipe, model, found, folder, place, processes, size)
        score = passes * num_samples * whole.model(model).forward / processes
    except Exception as error:  # an operator whose kernels can't be run without values
        first = next(iter(str(error).splitlines()), "")[:160]
        notes.append(f"memory and time are not estimated: {type(error).__name__}: {first}")
        rows = [_described(candidate, folder) for candidate in found]
    return {
        "candidates": rows, "by": by, "budget": budget, "at_least": at_least, "least_cost": least, "passes": passes,
        "num_samples": num_samples, "score_seconds": score, "missing": missing,
        "device": {"name": device_name(place), "memory_bytes": total_bytes(place), "processes": processes},
        "notes": notes,
    }  # fmt: skip


def _least_cost(
    teacher: nn.Module, found: list[Candidate], by: Cost, budget: float | None, at_least: int
) -> float | None:
    """The least share of the cost that can be had. Raises PlanError where the aim can't be met."""
    if by == "latency":
        for candidate in found:
            candidate.savings = {edit.site.path: 0.0 for edit in candidate.edits}
        best_choice(options_of(found), at_least=at_least)
        return None
    for candidate in found:
        candidate.savings = savings_of(teacher, candidate, by)
    options = options_of(found)
    best_choice(options, budget=budget, at_least=at_least)
    return min(choice.cost for choice in pareto_choices(options, at_least=at_least))


def _choices(found: list[Candidate]) -> int:
    """At most so many mixes are measured: the choice, the curve, and the rules that a candidate's layers allow."""
    sites = len({edit.site.path for candidate in found for edit in candidate.edits})
    return 1 + min(POINTS, sites) + 1 + len(RULES) * len(found)


def _rows(
    recipe: Recipe, model: nn.Module, found: list[Candidate], folder: str | Path, device: torch.device,
    processes: int, size: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Each candidate with the seconds and the memory of its stage 1."""
    rows = []
    config = recipe.distill
    precision = make_compute(device, (config or DistillConfig()).precision).precision
    watch = pace.Stopwatch(device, precision, next(model.parameters()).dtype, size)
    for candidate in found:
        row = _described(candidate, folder)
        if config is not None and candidate.entry.train and not row["done"]:
            own, plan = bare(recipe, [candidate.entry.to_dict()]), GraftPlan([candidate.entry])
            row |= {
                "seconds": pace.distill_seconds(watch, model, graft(model, plan), config, processes),
                "memory": stage_memory(own, "distill", model, plan, precision, processes),
                "remedy": remedies(own, "distill", family_of(model), processes),
            }
        rows.append(row)
    return rows


def _described(candidate: Candidate, folder: str | Path) -> dict[str, Any]:
    run = RunFolder(Path(folder) / "candidates" / candidate.name, writer=False)
    done = (run.path / "run.json").is_file() and run.result("distill") is not None
    return {
        "name": candidate.name, **candidate.entry.to_dict(), "layers": [edit.site.layer for edit in candidate.edits],
        "savings": list(candidate.savings.values()), "done": done, "seconds": 0.0, "memory": None, "remedy": None,
    }  # fmt: skip


def in_words(found: Mapping[str, Any]) -> Iterator[str]:
    """The rehearsal as lines for a person."""
    device, cost = found["device"], COSTS[found["by"]]
    memory = device["memory_bytes"]
    for row in found["candidates"]:
        sites = f"{len(row['layers'])} {'layer' if len(row['layers']) == 1 else 'layers'}"
        saved = (
            "" if found["least_cost"] is None else f", saves {_shares(row['savings'])} of the {cost} in each"
        )
        needs = row["memory"]
        todo = (
            "distilled already" if row["done"]
            else f"stage 1 {in_time(row['seconds'])}, {gigabytes(needs['total'])}" if needs
            else "nothing to distill"
        )  # fmt: skip
        yield f"{row['name']}: {sites}{saved}; {todo}"
        if needs and memory and needs["total"] > memory:
            yield f"  does not fit: {row['remedy']}"
    if (least := found["least_cost"]) is not None:
        aim = [f"at most {found['budget']:g} of the {cost}"] if found["budget"] is not None else []
        aim += [f"at least {found['at_least']} operators replaced"] if found["at_least"] else []
        yield f"aim: {' and '.join(aim)}: can be met (the least is {least:.4f} of the {cost})"
    for what in found["missing"]:
        yield f"missing: {what}"
    if (score := found["score_seconds"]) is not None:
        total = score + sum(row["seconds"] for row in found["candidates"])
        yield f"measuring: {found['passes']} times {found['num_samples']} samples, {in_time(score)}"
        yield (
            f"estimate for {device['name']}{f', {gigabytes(memory)} of memory' if memory else ''}"
            f"{f', {n} processes' if (n := device['processes']) > 1 else ''}: {in_time(total)} "
            "(not in it: loading, checkpoints)"
        )
    for text in found["notes"]:
        yield f"note: {text}"


def _shares(savings: list[float]) -> str:
    """What is saved at one site, from the least to the most: "0.29 %", "0.29 to 0.31 %"."""
    low, high = (f"{100 * value:.2f}" for value in (min(savings), max(savings)))
    return f"{low} %" if low == high else f"{low} to {high} %"


__all__ = ["in_words", "rehearse_search"]
