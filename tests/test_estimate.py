"""Dry runs: memory that is counted without values is what a run holds, and a recipe is rehearsed without weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_dit
from torch import nn

from grafting import GraftPlan, Replace, cli, graft
from grafting.analysis import estimate, pace
from grafting.analysis.memory import peak_bytes, weight_bytes
from grafting.families import family_of
from grafting.training.acceleration import frozen_copy
from grafting.training.compute import Compute
from grafting.training.config import DistillConfig, FinetuneConfig
from grafting.training.initialization import ReadoutFit
from grafting.training.loop import samples_per_pass
from grafting.training.pupils import pupils_of
from grafting.yaml_io import load_yaml


def test_memory_of_stage_2_is_what_a_real_pass_holds() -> None:
    teacher = tiny_dit()
    student = graft(teacher, GraftPlan([Replace("mha", [1, 3], "swa")]))
    config = FinetuneConfig(steps=1)
    bare = estimate.meta_copy(teacher)
    found = estimate.finetune_memory(
        bare, graft(bare, GraftPlan([Replace("mha", [1, 3], "swa")])), config, 5, "fp32"
    )
    x, t = torch.zeros(5, 1, 8, 8), torch.zeros(5, dtype=torch.int64)
    real = peak_bytes(lambda: student(x, t, t).float().square().mean().backward(), torch.device("cpu"))
    assert found["activations and gradients"] == pytest.approx(real, rel=0.02)
    assert found["weights"] == weight_bytes(teacher) + weight_bytes(student)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert found["optimizer"] == 2 * 4 * trained
    assert found["average"] == 4 * trained
    assert found["total"] == sum(size for part, size in found.items() if part != "total")


def test_the_copy_of_the_teachers_weights_in_bf16_is_counted_where_it_is_made() -> None:
    plan, bare = GraftPlan([Replace("mha", [1], "swa")]), estimate.meta_copy(tiny_dit())
    teacher, student = tiny_dit(), graft(bare, plan)
    copied = frozen_copy(teacher, Compute(torch.device("cpu"), "bf16"))
    more = weight_bytes(teacher, copied) - weight_bytes(teacher)
    assert more > weight_bytes(teacher) / 3
    matched, alone = (FinetuneConfig(steps=1, objectives={name: 1.0}) for name in ("output", "diffusion"))  # type: ignore[dict-item]

    def weights(precision: str) -> list[int]:
        found = [estimate.distill_memory(bare, student, DistillConfig(steps=1), 2, precision)]
        found += [
            estimate.finetune_memory(bare, student, config, 2, precision) for config in (matched, alone)
        ]
        return [parts["weights"] for parts in found]

    held = weight_bytes(bare, student)
    assert weights("fp32") == [held, held, held]
    assert weights("bf16") == [held + more, held + more, held]


SIDE_BY_SIDE = GraftPlan(
    [{"parallelize": {"groups": "pairs"}}, {"replace": {"target": "mlp", "layers": [1], "with": "mlp"}}]
)


def test_memory_of_blocks_side_by_side_is_what_real_passes_hold() -> None:
    teacher = tiny_dit()
    student, bare = graft(teacher, SIDE_BY_SIDE), estimate.meta_copy(teacher)
    x, t = torch.zeros(5, 1, 8, 8), torch.zeros(5, dtype=torch.int64)
    like = graft(bare, SIDE_BY_SIDE)
    found = estimate.finetune_memory(bare, like, FinetuneConfig(steps=1, num_validation=0), 5, "fp32")
    real = peak_bytes(lambda: student(x, t, t).float().square().mean().backward(), torch.device("cpu"))
    assert found["activations and gradients"] == pytest.approx(real, rel=0.05)

    config = DistillConfig(steps=1, num_validation=0)
    family = family_of(student)
    student = estimate.as_it_learns(student)
    pupils = pupils_of(family, student, teacher, config)
    assert [pupil.path for pupil in pupils] == ["blocks.1.mlp", "blocks.0-1", "blocks.2-3"]
    found = estimate.distill_memory(bare, like, config, 5, "fp32")
    parameters = {id(p): p for pupil in pupils for p in pupil.operator.parameters()}
    for parameter in student.parameters():
        parameter.grad = None
        parameter.requires_grad_(id(parameter) in parameters)

    def work() -> None:
        taps = family.taps(teacher, x, t, t, [pupil.path for pupil in pupils])
        for pupil in pupils:
            pupil.loss_on(taps.pop(pupil.path)).backward()

    real = peak_bytes(work, torch.device("cpu"))
    assert found["activations and gradients"] == pytest.approx(real, rel=0.05)
    assert found["optimizer"] == 2 * 4 * sum(p.numel() for p in parameters.values())
    assert found["weights"] == weight_bytes(teacher) + weight_bytes(student)
    assert estimate.checkpoint_bytes(like, config) == 4 * 4 * sum(p.numel() for p in parameters.values())


def test_a_recipe_is_rehearsed_without_weights_and_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: arch:DiT-S/8-D2\ndata: latents.safetensors\nplan:\n- replace: {target: mha, layers: [1], with: swa}\n"
        "evaluate: {reference: none.npz}\ndistill: {batch_size: 2}\nfinetune: {batch_size: 2}\nsample: {num: 4}\n"
    )
    monkeypatch.setattr(sys, "argv", ["graft", "run", str(recipe), "--dry-run"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    text = capsys.readouterr().out
    assert (
        load_yaml(text, "recipe", ValueError)["model"] == "arch:DiT-S/8-D2"
    )  # what is printed stays a recipe
    for words in ("# missing: data: latents.safetensors", "# missing: evaluate.reference: none.npz",
                  "#   distill (", "#   finetune (", "#   sample (", "#   disk: "):  # fmt: skip
        assert words in text
    assert list(tmp_path.iterdir()) == [recipe]

    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "runs/run/run.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:  # the folder is taken that nobody has asked for
        cli.main()
    assert not stop.value.code
    note = (
        "# note: without --dry-run this would be refused: 'runs/run' already holds a run; go on with --resume"
    )
    assert capsys.readouterr().out.splitlines()[-1].startswith(note)
    monkeypatch.setattr(sys, "argv", ["graft", "run", str(recipe), "--dry-run", "--out", "runs/run"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "already holds a run" in capsys.readouterr().err

    monkeypatch.setattr(sys, "argv", ["graft", "run", str(recipe), "--dry-run", "--set", "model=gone.pt"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "--set model=arch:DiT-XL/2" in capsys.readouterr().err


@pytest.fixture(scope="module")
def adapted() -> tuple[nn.Module, nn.Module, FinetuneConfig]:
    """A tiny PixArt, a student that shares its weights and has adapters, and the settings of its stage 2."""
    from pixart_tools import tiny_transformer

    from grafting.lora import Lora, add_lora, lora_targets

    teacher = tiny_transformer(sample_size=32)  # 256 tokens
    student = graft(teacher, GraftPlan([Replace("mha", [1, 3], "hyena_x")]), share=True)
    add_lora(student, Lora(rank=2, alpha=2, targets=lora_targets(student, None)))
    return teacher, student, FinetuneConfig(steps=1, lora={"rank": 2, "alpha": 2}, num_validation=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_stage_2_with_adapters_and_shared_weights(
    adapted: tuple[nn.Module, nn.Module, FinetuneConfig], checkpointing: bool
) -> None:
    from pixart_tools import captions

    from grafting.families import family_of
    from grafting.lora import is_lora
    from grafting.surgery import edited_sites

    teacher, student, config = adapted
    config = config.model_copy(update={"gradient_checkpointing": checkpointing})
    found = estimate.finetune_memory(
        estimate.meta_copy(teacher), estimate.meta_copy(student), config, 3, "fp32"
    )
    family, new = family_of(student), tuple(f"{path}." for path in edited_sites(student))
    trained = [p for name, p in student.named_parameters() if is_lora(name) or name.startswith(new)]
    others = [p for name, p in student.named_parameters() if not is_lora(name) and not name.startswith(new)]
    assert found["optimizer"] == 2 * found["average"] == 8 * sum(p.numel() for p in trained)
    for parameter in others:
        parameter.requires_grad_(False)
    family.set_checkpointing(student, checkpointing)
    x, t = torch.zeros(3, 4, 32, 32), torch.zeros(3, dtype=torch.int64)
    cond = captions(3, tokens=300)

    def work() -> None:
        family.predict(student, x, t, cond).float().square().mean().backward()

    work()
    for parameter in trained:
        parameter.grad = None
    real = peak_bytes(work, torch.device("cpu"))
    for parameter in (*trained, *others):
        parameter.grad = None
        parameter.requires_grad_(True)
    family.set_checkpointing(student, False)
    assert found["activations and gradients"] == pytest.approx(real, rel=0.05)


def test_a_cut_student_keeps_shares_of_gradients_that_are_not_there_when_a_large_batch_takes_most() -> None:
    teacher = estimate.meta_copy(tiny_dit())
    student = graft(teacher, GraftPlan([Replace("mha", [1], "swa")]))
    own = weight_bytes(student)
    for batch_size, least, most in (
        (1, 0.25, 0.75),
        (64, 0.0, 0.02),
    ):  # most is held late in backward, at its beginning
        whole, cut = (
            estimate.finetune_memory(teacher, student, config, batch_size, "fp32", processes=4)
            for config in (FinetuneConfig(shard=shard, optimizer="adamw") for shard in ("none", "full"))
        )
        gone = whole["activations and gradients"] - cut["activations and gradients"]
        assert least * own <= gone <= most * own
        assert whole["weights"] - cut["weights"] == own - own // 4
        held = FinetuneConfig().num_validation // 4 * (3 * 4 * 8 * 8 + 8)  # x0, x_t, noise, label
        assert whole["held-out batches"] == cut["held-out batches"] == held


def test_a_cut_student_is_a_copy_also_of_what_it_shares(
    adapted: tuple[nn.Module, nn.Module, FinetuneConfig],
) -> None:
    teacher, student, config = adapted
    config = config.model_copy(update={"shard": "full", "optimizer": "adamw"})
    whole, cut = (
        estimate.finetune_memory(teacher, student, config, 1, "fp32", processes=number) for number in (1, 2)
    )
    assert whole["weights"] == weight_bytes(teacher, student)
    assert cut["weights"] == weight_bytes(teacher) + weight_bytes(student) // 2 > whole["weights"]
    assert cut["total"] == sum(size for name, size in cut.items() if name != "total")


def test_what_is_shared_counts_once_and_one_graph_at_a_time_takes_less(
    adapted: tuple[nn.Module, nn.Module, FinetuneConfig],
) -> None:
    teacher = estimate.meta_copy(adapted[0])
    plan = GraftPlan([Replace("mha", "all", "hyena_x")])
    student, config = graft(teacher, plan, share=True), DistillConfig(steps=1, batch_size=4, micro_batch=2)
    assert [samples_per_pass(config, n) for n in (1, 2, 4)] == [2, 2, 1]
    one, all_ = (
        estimate.distill_memory(teacher, student, config, 2, "fp32", at_once=at_once)
        for at_once in (False, True)
    )
    new = sum(p.numel() for path in edited_paths(student) for p in student.get_submodule(path).parameters())
    assert one["weights"] == weight_bytes(teacher) + 4 * new
    # Of 4 equal operators, what 3 graphs hold beside the one: at least q, k and v, [2, 256, 32] each.
    grown = all_["activations and gradients"] - one["activations and gradients"]
    assert grown > 3 * 3 * 2 * 256 * 32 * 4
    assert {k: v for k, v in one.items() if "activ" not in k and k != "total"} == {
        k: v for k, v in all_.items() if "activ" not in k and k != "total"
    }


class Paces:
    """A stopwatch with figures of its own: 2 s and 3 s an image of an operator, 5 s of the teacher, 7 s a parameter."""

    def of(self, site: object) -> pace.Pace:
        return pace.Pace(2.0, 3.0)

    def model(self, model: nn.Module, up_to: int) -> pace.Pace:
        assert up_to == 3
        return pace.Pace(5.0, 0.0)

    def update(self, site: object, config: DistillConfig, average: bool) -> float:
        return 7.0


@pytest.mark.parametrize(
    ("changes", "processes", "teacher_passes"),
    [
        ({}, 1, 800),
        ({}, 8, 100),
        ({"reuse": 4}, 1, 200),
        ({"mode": "cached", "cache_samples": 24}, 1, 24),
        ({"mode": "cached", "cache_samples": 24}, 8, 24),  # each process fills the whole of its own
        ({"mode": "cached", "cache_samples": 8000}, 8, 800),  # never more than the visits
    ],
)
def test_seconds_of_stage_1(changes: dict[str, object], processes: int, teacher_passes: int) -> None:
    teacher = estimate.meta_copy(tiny_dit())
    student = graft(teacher, GraftPlan([Replace("mha", [1, 3], "hyena_x")]))
    config = DistillConfig.model_validate({
        "steps": 100, "batch_size": 8, "num_validation": 16, "validate_every": 25, "fit_samples": 32, **changes
    })  # fmt: skip
    found = pace.distill_seconds(Paces(), teacher, student, config, processes)  # type: ignore[arg-type]
    params = sum(
        p.numel() for path in edited_paths(student) for p in student.get_submodule(path).parameters()
    )
    learned, updates = (3 + 3) * 800 / processes, 100 * 7 * params
    held_out = 16 / processes
    beside = (5 + 2 + 2) * (held_out * (4 + 5) + 32)  # and calibration samples: teacher and both operators
    assert found == pytest.approx(5 * teacher_passes + learned + updates + beside, rel=1e-12)


def test_memory_of_the_readout_fits_is_what_they_hold() -> None:
    """Of wide layers it is more than training takes; so many are fitted at a time that it stays bounded."""
    teacher = tiny_dit()
    plan = GraftPlan([Replace("mlp", "all", "mlp", {"ratio": 16})])
    student, config = graft(teacher, plan), DistillConfig(steps=1, num_validation=0)
    family, paths = family_of(student), edited_paths(student)
    x, t = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)

    def work() -> None:
        fits = {path: ReadoutFit(student.get_submodule(path), x.device) for path in paths}  # type: ignore[arg-type]
        taps = family.taps(teacher, x, t, t, paths)
        for path, fit in fits.items():
            fit.add(taps[path])
            fit.solve(1e-4)

    bare = estimate.meta_copy(teacher)
    found = estimate.distill_memory(bare, graft(bare, plan), config, 2, "fp32")
    real = peak_bytes(work, torch.device("cpu"))
    before = weight_bytes(teacher) + weight_bytes(student) + found["best so far and held-out batches"]
    assert found["more for the readout fits, before the first step"] > 0
    assert found["total"] == pytest.approx(before + real, rel=0.1)


def test_seconds_of_blocks_side_by_side() -> None:
    """Their operators one after another, and the rest (modulation, merge) by its share of the FLOPs."""
    teacher = estimate.meta_copy(tiny_dit())
    student = graft(teacher, GraftPlan([{"parallelize": {"groups": "pairs"}}]))
    watch = pace.Stopwatch(torch.device("cpu"), "fp32", torch.float32, 4)
    watch.of = lambda site, frozen=False: pace.Pace(2.0, 3.0)  # type: ignore[method-assign,misc]
    family = family_of(student)
    [group, _] = family.group_sites(student)
    inside = [site for site in family.sites(student) if site.layer in (0, 1)]
    assert len(inside) == 4
    more = group.cost.total / sum(site.cost.total for site in inside)
    assert 1 < more < 3
    assert watch.group(student, group).forward == pytest.approx(4 * 2.0 * more)
    assert watch.group(student, group).both == pytest.approx(4 * 3.0 * more)


def test_disk_of_stored_activations() -> None:
    student = graft(
        estimate.meta_copy(tiny_dit()),
        GraftPlan([Replace("mha", [1, 3], "hyena_x"), Replace("mlp", [0], "mlp", train=False)]),
    )
    config = DistillConfig(steps=100, batch_size=8, mode="cached", cache_samples=24)
    site = 2 * (2 * 16 * 32 + 32)  # bytes a sample: input and output [16, 32], gate [32], float16
    assert [estimate.cache_bytes(student, config, n) for n in (1, 8)] == [24 * 2 * site, 8 * 24 * 2 * site]
    assert estimate.cache_bytes(student, DistillConfig(), 8) == 0


@pytest.mark.parametrize(
    ("evaluate", "most"), [(None, 3), ({"reference": "teacher", "features": "fashion"}, 4)]
)
def test_disk_of_samples_is_the_most_that_lies_there_while_they_are_drawn(
    tmp_path: Path, evaluate: dict[str, str] | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_runs import tiny_pipeline

    from grafting import generation, rehearsal

    pipeline = tiny_pipeline(tmp_path, evaluate=evaluate, sample={"num": 8, "batch_size": 4})
    there, assemble = list[int](), generation._assemble

    def joining(path: Path, parts: Any, *given: Any) -> None:
        assemble(path, parts, *given)
        inside = [file.stat().st_size for file in path.parent.rglob("*.np[yz]")]
        there.append(sum(inside))

    monkeypatch.setattr(generation, "_assemble", joining)
    pipeline.sample()
    teacher = estimate.meta_copy(pipeline.teacher)
    found = rehearsal._disk(pipeline.recipe, teacher, pipeline.recipe.graft_plan, 1)["samples"]
    images = 8 * 8 * 8
    assert found == most * images
    assert max(there) == pytest.approx(found, abs=most * 2000)  # heads of files
    assert max(there) > found


def edited_paths(student: nn.Module) -> list[str]:
    from grafting.surgery import edited_sites

    return list(edited_sites(student))


REAL_SIZE = [
    "pixart-sigma-2k", "depth-to-width", "table4/mha-hyena_x-50", "table4/mha-mamba2-75", "table4/mlp-r6-50",
    "table4/mlp-hyena_x-50", "data-scale/mha-self-data0.63",
]  # fmt: skip


@pytest.mark.parametrize("name", REAL_SIZE)
def test_recipes_of_real_size_are_rehearsed_without_weights(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One of each kind; sizes and times are stubbed here, and docs/costs.md has them."""
    from grafting import rehearsal
    from grafting.pipeline import Pipeline
    from grafting.recipes import load_recipe
    from grafting.runs import RunFolder

    for stage in ("distill", "finetune", "sample"):
        monkeypatch.setattr(pace, f"{stage}_seconds", lambda *_, **__: 60.0)
    monkeypatch.setattr(rehearsal, "stage_memory", lambda *_: {"weights": 10**9, "total": 10**18})
    recipe = load_recipe(name, [] if "/" not in name else ["preset=paper"])
    found = rehearsal.rehearse(Pipeline(recipe, RunFolder(tmp_path / "run"), "cpu"))
    lines = list(rehearsal.in_words(found))
    assert any(line.startswith("missing: model: the weights of ") for line in lines)
    assert any(line.startswith("missing: data: ") for line in lines)
    assert set(found["stages"]) == {"distill", "finetune", "sample"}
    remedy = (
        "say shard: full" if name == "pixart-sigma-2k" else "lower finetune.micro_batch (samples of a pass: "
    )
    assert any(f"finetune does not fit: {remedy}" in line for line in lines)
    assert found["disk_bytes"]["graft"] > 10**6
    assert not found["notes"] or "GPU" in found["notes"][0]


def test_every_recipe_of_real_size_resolves() -> None:
    """Their plans match the models that they name; layers by locality need the file of `graft locality`."""
    from functools import cache

    from grafting.errors import PlanError
    from grafting.loading import load_model
    from grafting.recipes import experiments, load_recipe
    from grafting.rehearsal import ARCHITECTURES
    from grafting.surgery import match

    bare, seen = cache(lambda source: load_model(source, device="meta")), set()
    for study in ("table4", "objectives", "data-scale", "layer-choice"):
        for row in experiments()[study]:
            recipe = load_recipe(f"{study}/{row}", ["preset=paper"])
            if (key := str(recipe.graft_plan)) in seen:
                continue
            seen.add(key)
            if "local" in row and "interleaved" not in row:
                with pytest.raises(PlanError, match="graft locality"):
                    match(bare(ARCHITECTURES[recipe.model]), recipe.graft_plan, recipe.locality)
            else:
                match(bare(ARCHITECTURES[recipe.model]), recipe.graft_plan, recipe.locality)
    assert len(seen) > 25
