"""Run folders, recipes and the pipeline: every packaged recipe is built and run for two steps on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import prediction, tiny_dit
from tiny_runs import tiny_pipeline

from grafting import Replace, load_graft, load_model, save_model
from grafting.console import Console
from grafting.errors import GraftError, RunError
from grafting.pipeline import Pipeline, open_pipeline
from grafting.recipes import PRESETS, Recipe, load_recipe, packaged
from grafting.runs import RunFolder
from grafting.runs.machine import environment

QUICK = {
    "steps": 2, "batch_size": 8, "num_validation": 4, "warmup": 0, "log_every": 1, "validate_every": 1,
    "checkpoint_every": 1, "precision": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny teacher, one of 28 blocks, and tiny data."""
    folder = tmp_path_factory.mktemp("world")
    for name, depth, width in (("model", 4, 32), ("deep", 28, 16)):
        teacher = tiny_dit(depth=depth, hidden_size=width, patch_size=4, num_classes=10)
        save_model(teacher, folder / name)
    generator = np.random.default_rng(0)
    np.savez(
        folder / "data.npz",
        arr_0=generator.normal(size=(40, 1, 8, 8)).astype(np.float32),
        arr_1=np.arange(40) % 10,
    )
    return folder


def tiny(world: Path, **changes: Any) -> Recipe:
    return load_recipe({
        "model": str(world / "model"), "data": str(world / "data.npz"), "evaluate": None,
        "plan": [{"replace": {"target": "mha", "layers": [1, 3], "with": "hyena_x"}}],
        "distill": QUICK | {"fit_samples": 8}, "finetune": QUICK, "sample": {"num": 4, "steps": 2}, **changes,
    })  # fmt: skip


def run(recipe: Recipe, path: Path, resume: bool = False) -> RunFolder:
    pipeline = Pipeline(recipe, RunFolder(path))
    pipeline.check()
    pipeline.run = RunFolder.create(path, recipe.to_dict(), Console(quiet=True), resume=resume)
    pipeline.all()
    return pipeline.run


@pytest.fixture(scope="module")
def uncut(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The tiny recipe, run from start to end: to read."""
    return run(tiny(world), tmp_path_factory.mktemp("uncut") / "run")


@pytest.mark.parametrize("name", packaged())
def test_every_packaged_recipe_runs_two_steps_on_a_tiny_model(world: Path, tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.about
    assert recipe.name == name
    trained = [stage for stage in ("distill", "finetune") if getattr(recipe, stage) is not None]
    overrides = [f"{stage}.{key}={value}" for stage in trained for key, value in QUICK.items()]
    overrides += [f"model={world / 'deep'}", f"data={world / 'data.npz'}", "evaluate=null", "fraction=1.0",
                  "sample.num=4", "sample.steps=2"]  # fmt: skip
    overrides += ["synthesize=null", "sample.prompts=null"]  # a DiT has no captions
    overrides += ["distill.fit_samples=8"] * ("distill" in trained)
    overrides += ["finetune.gradient_checkpointing=false"] * ("finetune" in trained)  # a DiT has none
    folder = run(load_recipe(name, overrides), tmp_path / "run")
    state = folder.read()
    assert set(state["stages"]) >= {"graft", *trained, "sample"}
    assert (folder.path / "report.html").is_file()
    for who in ("teacher", "student"):
        assert np.load(folder.path / "samples" / f"{who}.npz")["arr_0"].shape == (4, 8, 8, 1)
    student = load_graft(folder.path / "graft")
    wanted = {
        (t, n): e.operator
        for e in recipe.graft_plan.resolve(28)
        if isinstance(e, Replace)
        for t, n in [(e.target, n) for n in e.layers]
    }
    blocks = student.blocks
    for (target, layer), operator in wanted.items():
        module = blocks[layer].attn if target == "mha" else blocks[layer].mlp
        assert module.operator_name == operator


def test_a_run_folder_holds_what_it_says(world: Path, uncut: RunFolder) -> None:
    folder = uncut
    names = {path.name for path in folder.path.iterdir()}
    assert {
        "recipe.yaml",
        "plan.yaml",
        "run.json",
        "graft",
        "metrics.jsonl",
        "samples",
        "report.html",
    } <= names
    assert not list(folder.path.glob("checkpoints/*/*"))  # no longer needed
    records = folder.metrics()
    for stage in ("distill", "finetune"):
        assert [r["step"] for r in records if r["stage"] == stage and "lr" in r] == [1, 2]
    protocol = json.loads(str(np.load(folder.path / "samples/student.npz")["meta"]))
    assert {k: protocol[k] for k in ("num_samples", "steps", "sampler", "guidance", "seed")} == {
        "num_samples": 4, "steps": 2, "sampler": "ddim", "guidance": 1.5, "seed": 0,
    }  # fmt: skip
    assert prediction(load_model(folder.path)).isfinite().all()
    assert open_pipeline(folder.path, Console(quiet=True)).recipe == tiny(world)


def test_the_same_recipe_gives_the_same_bytes_whatever_torch_s_seed(world: Path, tmp_path: Path) -> None:
    folders = []
    for number in range(2):
        torch.manual_seed(number)
        folders.append(run(tiny(world, seed=3), tmp_path / str(number)).path)
    for name in ("recipe.yaml", "plan.yaml", "metrics.jsonl", "samples/student.npz", "samples/teacher.npz"):
        if name.endswith(".npz"):
            a, b = (np.load(folder / name)["arr_0"] for folder in folders)
            assert np.array_equal(a, b), name
        else:
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    graft = [next((folder / "graft").glob("*.safetensors")) for folder in folders]
    assert graft[0].read_bytes() == graft[1].read_bytes()
    other = run(tiny(world, seed=4), tmp_path / "other").path
    assert next((other / "graft").glob("*.safetensors")).read_bytes() != graft[0].read_bytes()


@pytest.mark.parametrize("stage", ["graft", "distill", "finetune", "sample"])
def test_a_run_that_died_after_a_stage_goes_on(
    world: Path, uncut: RunFolder, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it died between the last file of a stage and the note that the stage is done."""
    whole = uncut.path

    class Dead(Exception):
        pass

    finish = RunFolder.finish

    def die(self: RunFolder, name: str, result: Any) -> None:
        if name == stage:
            raise Dead
        finish(self, name, result)

    monkeypatch.setattr(RunFolder, "finish", die)
    with pytest.raises(Dead):
        run(tiny(world), tmp_path / "cut")
    monkeypatch.setattr(RunFolder, "finish", finish)
    with pytest.raises(RunError, match="already holds a run"):
        run(tiny(world), tmp_path / "cut")
    found = run(tiny(world), tmp_path / "cut", resume=True).path
    a, b = (next((folder / "graft").glob("*.safetensors")) for folder in (whole, found))
    assert a.read_bytes() == b.read_bytes()
    assert (whole / "metrics.jsonl").read_bytes() == (found / "metrics.jsonl").read_bytes()
    run(tiny(world), tmp_path / "cut", resume=True)  # nothing left to do


def test_a_run_stopped_between_its_first_two_files_goes_on(world: Path, tmp_path: Path) -> None:
    recipe = tiny(world, distill=None, finetune=None)
    folder = RunFolder.create(tmp_path / "x", recipe.to_dict(), Console(quiet=True))
    (folder.path / "run.json").unlink()
    run(recipe, tmp_path / "x", resume=True)


def test_stages_can_be_left_out(world: Path, tmp_path: Path) -> None:
    folder = run(tiny(world, distill=None, finetune=None), tmp_path / "run")
    assert set(folder.read()["stages"]) == {"graft", "sample"}


def test_stage_1_leaves_the_rest_of_the_model_and_what_is_stored_small(world: Path, tmp_path: Path) -> None:
    folder = run(tiny(world, finetune=None), tmp_path / "run").path
    from safetensors import safe_open

    with safe_open(next((folder / "graft").glob("*.safetensors")), "pt") as file:
        assert {name.split(".attn")[0] for name in file.keys()} == {"blocks.1", "blocks.3"}  # noqa: SIM118


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"evaluate": {"reference": "nowhere.npz"}}, "nowhere.npz"),
        ({"evaluate": {"features": "resnet"}}, "resnet"),
        ({"evaluate": {}, "sample": {"num": 3}}, "sample.num=3"),
        ({"data": "nowhere.npz"}, "nowhere.npz"),
        ({"data": "fashion-10"}, "shape"),
        ({"model": "nowhere"}, "nowhere"),
        ({"plan": [{"replace": {"target": "mha", "layers": [4], "with": "swa"}}]}, "layer 4"),
        ({"plan": [{"replace": {"target": "mha", "layers": "top-local-50", "with": "swa"}}]}, "graft locality"),
        ({"locality": "nowhere.json",
          "plan": [{"replace": {"target": "mha", "layers": "top-local-50", "with": "swa"}}]}, "nowhere.json"),
    ],
    ids=str,
)  # fmt: skip
def test_what_can_be_refused_is_refused_before_any_work(
    world: Path, tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    with pytest.raises(GraftError, match=word):
        run(tiny(world, **change), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"modle": "x"}, "model"),
        ({"distill": {"stesp": 3}}, "distill.stesp.*steps.*known: steps"), ({"preset": "papper"}, "paper"),
        ({"seed": -1}, "seed"), ({"fraction": 0}, "fraction"), ({"sample": {"sampler": "euler"}}, "sampler"),
        ({"sample": {"steps": 0}}, "steps"), ({"sample": {"guidance": float("inf")}}, "guidance"),
        ({"finetune": {"objectives": {"difusion": 1}}}, "objectives"), ({"plan": "interleaved-50"}, "plan"),
    ],
    ids=str,
)  # fmt: skip
def test_recipes_that_make_no_sense_are_refused(world: Path, change: dict[str, Any], word: str) -> None:
    with pytest.raises(GraftError, match=word) as caught:
        tiny(world, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "plan", [[], [{"replace": {}}], [{"swap": {}}], [3], [{"replace": {"target": "mha"}}]], ids=str
)
def test_recipes_with_a_bad_plan_are_refused(world: Path, plan: list[Any]) -> None:
    with pytest.raises(RunError, match="plan") as caught:
        tiny(world, plan=plan)
    assert "\n" not in str(caught.value)


def test_overrides_and_presets(tmp_path: Path) -> None:
    plain = load_recipe("demo")
    changed = load_recipe("demo", ["distill.steps=7", "sample.sampler=ddpm", "finetune=null", "seed=5"])
    assert (changed.distill.steps, changed.sample.sampler, changed.finetune, changed.seed) == (
        7,
        "ddpm",
        None,
        5,
    )
    assert changed.distill.batch_size == plain.distill.batch_size
    paper = load_recipe("demo", ["preset=paper"])
    assert paper.finetune.ema_decay == 0.9999
    assert paper.finetune.steps == 350  # what the recipe says wins over the preset
    assert load_recipe("demo", ["preset=paper-code"]).distill.lr == 5e-4
    objectives = load_recipe("demo", ["finetune.objectives={diffusion: 1.0}"]).finetune.objectives
    assert objectives == {"diffusion": 1.0}  # replaced, not merged
    for name in PRESETS:
        assert load_recipe("demo", [f"preset={name}"]).preset == name
    for bad in (
        "distill",
        "distill.steps",
        "=3",
        ".=3",
        "name.x=3",
        "distill.steps=[",
        "distill.steps=!!python/x 1",
    ):
        with pytest.raises(RunError):
            load_recipe("demo", [bad])
    file = tmp_path / "r.yaml"
    file.write_text("- 1\n")
    with pytest.raises(RunError, match="mapping"):
        load_recipe(file)
    with pytest.raises(RunError, match="demo"):
        load_recipe("demoo")


def test_the_paper_preset_is_the_paper() -> None:
    recipe = load_recipe("table4/mha-hyena_x-50", ["preset=paper"])
    stage_1, stage_2 = recipe.distill, recipe.finetune
    assert (stage_1.steps * stage_1.batch_size, stage_1.lr, stage_1.clip) == (8000 * 200, 1e-4, 10)
    assert (stage_2.steps, stage_2.batch_size, stage_2.lr, stage_2.warmup) == (50_000, 256, 1e-4, 1000)
    assert (stage_2.ema_decay, stage_2.weight_decay, stage_2.clip) == (0.9999, 0, 10)
    assert (recipe.sample.num, recipe.sample.steps, recipe.sample.sampler, recipe.sample.guidance) == (
        50_000,
        250,
        "ddpm",
        1.5,
    )


@pytest.mark.parametrize("damage", ["run.json", "recipe.yaml", "recipe.yaml key", "graft"])
def test_a_damaged_run_folder_is_named(world: Path, tmp_path: Path, damage: str) -> None:
    recipe = tiny(world, distill=None, finetune=None)
    folder = run(recipe, tmp_path / "run").path
    if damage == "run.json":
        (folder / "run.json").write_text("{")
    elif damage == "recipe.yaml":
        (folder / "recipe.yaml").write_text("- 1\n")
    elif damage == "recipe.yaml key":
        (folder / "recipe.yaml").write_text("model: x\ndata: y\nplan: []\nwhat: 3\n")
    else:
        (folder / "graft/graft.json").unlink()
    with pytest.raises(GraftError) as caught:
        open_pipeline(folder, Console(quiet=True)).student()
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run\.json"):
        RunFolder.open(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not an empty folder"):
        RunFolder.create(tmp_path, {}, Console(quiet=True))
    with pytest.raises(RunError, match="not an empty folder"):
        RunFolder.create(tmp_path / "notes.txt", {}, Console(quiet=True))
    with pytest.raises(GraftError, match="can't write"):
        RunFolder.create(tmp_path / "notes.txt" / "run", {}, Console(quiet=True))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    run = RunFolder.create(tmp_path / "new", {"a": 1}, Console(quiet=True))
    with pytest.raises(RunError, match="different: a, b"):
        RunFolder.create(run.path, {"a": 2, "b": 3}, Console(quiet=True), resume=True)


def test_checkpoints_rotate_and_hold_what_was_saved(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.load_checkpoint("s") is None
    for step in (1, 5, 9):
        folder.save_checkpoint(
            "s", step, {"step": step, "x": torch.full((2,), float(step)), "n": None}, keep=2
        )
    assert sorted(p.name for p in (tmp_path / "checkpoints/s").iterdir()) == [
        f"{step:09d}.{kind}" for step in (5, 9) for kind in ("json", "pt")
    ]
    state = folder.load_checkpoint("s")
    assert (state["step"], state["x"].tolist(), state["n"]) == (9, [9.0, 9.0], None)


def test_non_finite_numbers_become_null_in_the_log(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log(
        {"stage": "s", "step": 1, "loss": float("nan"), "all": {"a": float("inf"), "b": [1.0, float("-inf")]}}
    )
    assert folder.metrics() == [{"stage": "s", "step": 1, "loss": None, "all": {"a": None, "b": [1.0, None]}}]


def test_a_run_does_not_go_on_with_other_data(world: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    data.write_bytes((world / "data.npz").read_bytes())
    recipe = tiny(world, data=str(data), finetune=None)
    run(recipe, tmp_path / "run")
    with np.load(data) as arrays:
        np.savez(data, arr_0=arrays["arr_0"] + 1e-3, arr_1=arrays["arr_1"])
    pipeline = open_pipeline(tmp_path / "run", Console(quiet=True))
    with pytest.raises(RunError, match=r"the data 'data' is no longer what this run began with"):
        pipeline.finetune()


def test_what_was_checked_before_a_run_is_not_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("grafting.pipeline.image_shape", lambda *given: asked.append(given) or (8, 8, 1))
    once = {"distill": None, "finetune": None}
    pipeline = tiny_pipeline(tmp_path, "checked", **once)
    pipeline.check(to_the_end=True)  # as `graft run` does before it writes anything
    pipeline.all()
    assert len(asked) == 1
    tiny_pipeline(tmp_path, "unchecked", **once).all()
    assert len(asked) == 2


def test_every_gpu_is_named_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = ["A", "B", "A"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_name", cards.__getitem__)
    assert environment()["gpu"] == "2 x A, B"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "gpu" not in environment()


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")],
)  # fmt: skip
def test_a_lack_of_memory_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    pipeline = tiny_pipeline(tmp_path)

    def short(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("grafting.pipeline.finetune", short)
    with pytest.raises(
        RunError, match=r"finetune on cpu ran out of memory .*finetune\.micro_batch.*--resume"
    ):
        pipeline.finetune()
    monkeypatch.setattr(
        "grafting.pipeline.finetune", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("other"))
    )
    with pytest.raises(RuntimeError, match="other"):
        pipeline.finetune()
