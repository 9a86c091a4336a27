"""`graft run --dry-run`: what a recipe would do, what is missing for it here, and what it would need. Does nothing.

Works without weights: a model that is not here is taken as its architecture, if its name says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grafting.analysis import estimate, pace
from grafting.analysis.costs import plan_cost
from grafting.analysis.headroom import fitting_batch_size, total_bytes
from grafting.analysis.latency import device_name
from grafting.analysis.memory import gigabytes, weight_bytes
from grafting.data.packaged_captions import check_prompts
from grafting.errors import CheckpointError, DataError
from grafting.evaluation.measure import check_measures
from grafting.evaluation.reference import FASHION_TRAIN, TEACHER
from grafting.families import family_of
from grafting.families.codec import check_latents
from grafting.loading import is_here, load_model
from grafting.lora import is_lora
from grafting.needs import remedies, stage_memory, student_of
from grafting.pipeline import Pipeline
from grafting.plan import GraftPlan
from grafting.recipes import Recipe
from grafting.surgery import explain, graft
from grafting.training.compute import make_compute
from grafting.training.config import FinetuneConfig, Optimization
from grafting.training.loop import Batches, samples_per_pass

# What the weights of these hub ids are, for estimates without them.
ARCHITECTURES = {
    "facebook/DiT-XL-2-256": "arch:DiT-XL/2",
    "facebook/DiT-XL-2-512": "arch:DiT-XL/2-512",
    "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": "arch:PixArt-Sigma-512",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "arch:PixArt-Sigma-1024",
    "PixArt-alpha/PixArt-Sigma-XL-2-2K-MS": "arch:PixArt-Sigma-2K",
}
VAE_SIDE = 8  # pixels per latent


def rehearse(
    pipeline: Pipeline, *, processes: int = 1, watches: dict[str, pace.Stopwatch] | None = None
) -> dict[str, Any]:
    """Check what can be checked, and estimate memory, time and disk on the pipeline's device.

    watches: precision -> what was timed before; filled, so that several recipes time an operator once.
    {"plan": {"summary", "rows", "model"}, "missing": [...], "device", "stages": {stage: {"memory": {part: bytes},
    "seconds", "precision", "remedy" (what takes less memory)}}, "disk_bytes", "notes"}. Raises GraftError for what the
    run would refuse; files that are not here are `missing`.
    """
    recipe = pipeline.recipe
    missing: list[str] = []
    teacher = teacher_of(pipeline, missing)
    explanation = explain(teacher, recipe.graft_plan, recipe.locality)
    costs = plan_cost(teacher, explanation.plan)
    check_inputs(pipeline, teacher, missing)
    device = torch.device(pipeline.device)
    bare = estimate.meta_copy(teacher)
    notes: list[str] = []
    stages: dict[str, Any] = {}
    disk: dict[str, int] = {}
    try:
        stages = _stages(
            recipe, bare, explanation.plan, device, processes, {} if watches is None else watches
        )
        disk = _disk(recipe, bare, explanation.plan, processes)
    except Exception as error:  # an operator whose kernels can't be run without values
        first = next(iter(str(error).splitlines()), "")[:160]
        notes.append(f"memory, time and disk are not estimated: {type(error).__name__}: {first}")
    if device.type == "cpu" and torch.cuda.is_available():
        notes.append("this is for the CPU; a GPU is here: --device cuda")
    return {
        "plan": {"summary": str(explanation.plan), "rows": costs["rows"], "model": costs["model"]},
        "missing": missing,
        "device": {
            "name": device_name(device),
            "memory_bytes": total_bytes(device),
            "processes": processes,
        },
        "stages": stages,
        "disk_bytes": disk,
        "notes": notes,
    }


def teacher_of(pipeline: Pipeline, missing: list[str]) -> nn.Module:
    """The recipe's model, without weights where it has none here."""
    source, heads = pipeline.recipe.model, pipeline.recipe.num_heads
    if source.startswith("arch:"):
        return load_model(source, device="meta")
    if is_here(source):
        return pipeline.teacher
    if source in ARCHITECTURES:
        missing.append(f"model: the weights of {source} (a run would get them from the hub)")
        return load_model(ARCHITECTURES[source], device="meta")
    raise CheckpointError(
        f"the weights of {source!r} are not here, and its name does not say which architecture they are of; "
        f"for an estimate without them give --set model=arch:DiT-XL/2{' and leave out num_heads' if heads else ''}"
    )


def check_inputs(pipeline: Pipeline, teacher: nn.Module, missing: list[str]) -> None:
    """Data, reference and features: what is not here is `missing`. Raises GraftError for what can't be used."""
    _check_data(pipeline, teacher, missing)
    _check_evaluation(pipeline, teacher, missing)


def _check_data(pipeline: Pipeline, teacher: nn.Module, missing: list[str]) -> None:
    recipe = pipeline.recipe
    if recipe.synthesize is not None:  # the run makes it
        check_prompts(recipe.synthesize.prompts)
        return
    if recipe.distill is None and recipe.finetune is None:
        return
    try:
        data = pipeline.data
    except DataError:
        if Path(recipe.data.partition(":")[2] or recipe.data).exists():
            raise
        missing.append(f"data: {recipe.data}")
        return
    Batches(
        data, family_of(teacher), teacher, seed=0, purpose="check", label_dropout=0.0,
        device=torch.device("cpu"),
    )  # fmt: skip
    check_latents(data, recipe.sample.vae)


def _check_evaluation(pipeline: Pipeline, teacher: nn.Module, missing: list[str]) -> None:
    config = pipeline.recipe.evaluate
    if config is None:
        return
    absent = []
    if config.reference not in (FASHION_TRAIN, TEACHER) and not Path(config.reference).is_file():
        absent.append(f"evaluate.reference: {config.reference}")
    kind, _, weights = config.features.partition(":")
    if weights and not Path(weights).is_file():
        absent.append(f"evaluate.features: {kind}: {weights}")
    if absent:
        missing += absent
    else:
        pipeline.check_evaluation()
        channels, height, width = family_of(teacher).sample_shape(teacher)
        shape = (height, width, channels) if channels in (1, 3) else (VAE_SIDE * height, VAE_SIDE * width, 3)
        check_measures(config.reference, config.features, shape)


def _stages(
    recipe: Recipe, teacher: nn.Module, plan: GraftPlan, device: torch.device, processes: int,
    watches: dict[str, pace.Stopwatch],
) -> dict[str, Any]:  # fmt: skip
    """Memory and seconds of each stage that the recipe has."""
    found: dict[str, Any] = {}
    dtype = next(teacher.parameters()).dtype
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else dtype
    teacher = nn.Module.to(teacher, dtype=dtype)  # diffusers' own warns of what it would not do
    student = graft(teacher, plan)

    def note(stage: str, given: str, size: int, seconds: Callable[[pace.Stopwatch], float]) -> None:
        precision = make_compute(device, given).precision
        watch = watches.setdefault(precision, pace.Stopwatch(device, precision, dtype, size))
        memory = stage_memory(recipe, stage, teacher, plan, precision, processes)
        found[stage] = {
            "memory": memory, "seconds": seconds(watch), "precision": precision,
            "remedy": remedies(recipe, stage, family_of(teacher), processes),
        }  # fmt: skip

    if (first := recipe.distill) is not None and len(recipe.graft_plan):
        size = samples_per_pass(first, processes)
        note("distill", first.precision, size,
             lambda watch: pace.distill_seconds(watch, teacher, student, first, processes))  # fmt: skip
    if (second := recipe.finetune) is not None:
        size = samples_per_pass(second, processes)
        adapted = student_of(recipe, "finetune", teacher, plan)
        adapters = sum(p.numel() for name, p in adapted.named_parameters() if is_lora(name))
        note("finetune", second.precision, size,
             lambda watch: pace.finetune_seconds(watch, teacher, student, second, processes, adapters))  # fmt: skip
    draw = recipe.sample
    if draw.batch_size == "auto":
        size = fitting_batch_size(
            teacher, draw.num, device, guidance=draw.guidance, precision=make_compute(device, draw.precision).precision,
            processes=processes, held=weight_bytes(teacher, student),
        )  # fmt: skip
    else:
        size = min(draw.num, draw.batch_size)
    recipe = recipe.model_copy(update={"sample": draw.model_copy(update={"batch_size": size})})
    note("sample", draw.precision, size, lambda watch: pace.sample_seconds(
        watch, teacher, student, num=draw.num, steps=draw.steps, guidance=draw.guidance
    ))  # fmt: skip
    return found


def _disk(recipe: Recipe, teacher: nn.Module, plan: GraftPlan, processes: int) -> dict[str, int]:
    """Bytes that the run folder and its temporary files take at most."""
    student = student_of(recipe, "finetune", teacher, plan)
    own = weight_bytes(teacher, student) - weight_bytes(teacher)  # what a graft folder holds
    checkpoints = [
        _most_checkpoints(config) * estimate.checkpoint_bytes(student, config)
        for config in (recipe.distill, recipe.finetune)
        if config is not None
    ]
    channels, height, width = family_of(teacher).sample_shape(teacher)
    pixels = channels * height * width if channels in (1, 3) else 3 * height * width * VAE_SIDE**2
    # The last file is there twice while it is made: its batches, and what they are joined to.
    files = 3 + (recipe.evaluate is not None and recipe.evaluate.reference == TEACHER)
    return {
        "checkpoints": max(checkpoints, default=0),
        "graft": own,
        "samples": files * recipe.sample.num * pixels,
        "activations": estimate.cache_bytes(student, recipe.distill, processes) if recipe.distill else 0,
    }


def _most_checkpoints(config: Optimization) -> int:
    """How many a stage has on disk at once: one more is written before the oldest goes; stage 2 keeps its best, too."""
    return config.keep_checkpoints + (
        2 if isinstance(config, FinetuneConfig) and config.num_validation else 1
    )


def in_words(found: Mapping[str, Any]) -> Iterator[str]:
    """The rehearsal as lines for a person."""
    yield from found["plan"]["summary"].splitlines()
    for row in found["plan"]["rows"]:
        featurizer = "" if row["flops_ft_pct"] is None else f", projections {row['flops_ft_pct']:+.2f} %"
        yield (
            f"{row['target']} -> {row['operator']} in {len(row['layers'])} layers: operator FLOPs "
            f"{row['flops_op_pct']:+.2f} %{featurizer}, parameters {row['params_pct']:+.2f} % of all {row['target']}"
        )
    params, flops = found["plan"]["model"]["params"], found["plan"]["model"]["flops_per_image"]
    yield (
        f"model: {params[0] / 1e6:.1f}M -> {params[1] / 1e6:.1f}M parameters, "
        f"{flops[0] / 1e9:.2f} -> {flops[1] / 1e9:.2f} GFLOPs an image"
    )
    for what in found["missing"]:
        yield f"missing: {what}"
    device = found["device"]
    memory = device["memory_bytes"]
    yield (
        f"estimate for {device['name']}{f', {gigabytes(memory)} of memory' if memory else ''}"
        f"{f', each of {n} processes' if (n := device['processes']) > 1 else ''}:"
    )
    for stage, needs in found["stages"].items():
        total = needs["memory"]["total"]
        parts = ", ".join(
            f"{name} {gigabytes(size)}" for name, size in needs["memory"].items() if name != "total"
        )
        yield f"  {stage} ({needs['precision']}): {in_time(needs['seconds'])}, {gigabytes(total)} ({parts})"
        if memory and total > memory:
            yield f"  {stage} does not fit: {needs['remedy']}"
    if not found["stages"]:
        yield "  none"
    disk = found["disk_bytes"]
    if disk:
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in disk.items() if size)
        yield f"  disk: {gigabytes(sum(disk.values()))} ({parts})"
    yield "  not in it: loading, checkpoints, decoding latents, measuring samples, the data in memory"
    for note in found["notes"]:
        yield f"note: {note}"


def in_time(seconds: float) -> str:
    """Seconds in the unit that a person would say."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.1f} h" if minutes < 2880 else f"{minutes / 1440:.1f} days"


__all__ = ["ARCHITECTURES", "check_inputs", "in_time", "in_words", "rehearse", "teacher_of"]
