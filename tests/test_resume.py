"""What `--resume` may change of a recipe, and what of a checkpoint stays in memory."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import tiny_pipeline, tiny_recipe

from grafting import load_graft
from grafting.console import Console
from grafting.errors import Interrupted, RunError
from grafting.formats import weights
from grafting.recipes import load_recipe
from grafting.recipes.settings import FREE_KEYS
from grafting.runs import RunFolder, checkpoints
from grafting.training.finetuning import _Stage
from grafting.training.loop import load_checkpoint

OBJECTIVES = {"diffusion": 1.0, "output": 1.0, "features": 0.1}  # those that a batch could be cut wrongly for
OTHER: dict[str, dict[str, Any]] = {  # of every stage, what changes its result by rounding at most
    "distill": {
        "micro_batch": 3, "compile": False, "checkpoint_every": 3, "keep_checkpoints": 5, "log_every": 2,
        "cache_limit_gb": 1.0,
    },
    "finetune": {
        "micro_batch": 3, "compile": False, "checkpoint_every": 3, "keep_checkpoints": 5, "log_every": 2,
        "shard": "full", "preview_every": 3, "preview_samples": 2,
    },
    "sample": {"batch_size": 3, "compile": False},
}  # fmt: skip


def weights_and_images(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a finished run, each as one row."""
    images = torch.from_numpy(np.load(folder / "samples" / "student.npz")["arr_0"].astype(np.float32))
    values = load_graft(folder / "graft").state_dict().values()
    return torch.cat([value.flatten() for value in values]), images.flatten()


@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_what_changes_a_result_by_rounding_only_may_change_on_resume(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"finetune": {"objectives": OBJECTIVES}}
    tiny_pipeline(tmp_path, "whole", **changes).all()
    pipeline = tiny_pipeline(tmp_path, **changes)
    asked = iter([None, None, 143])
    with monkeypatch.context() as stop:
        going = {"graft": [], "distill": [], "finetune": ["distill"]}[stage]
        for before in going:
            getattr(pipeline, before)()
        stop.setattr(pipeline.run, "stop_requested", lambda: next(asked))
        with pytest.raises(Interrupted):
            getattr(pipeline, stage)()
    others = {name: {**OTHER[name], **changes.get(name, {})} for name in OTHER}
    pipeline = tiny_pipeline(tmp_path, resume=True, **others)
    pipeline.all()
    assert pipeline.run.recipe()["finetune"]["micro_batch"] == 3
    pairs = zip(weights_and_images(tmp_path / "whole"), weights_and_images(tmp_path / "run"), strict=True)
    for whole, cut in pairs:  # together: AdamW makes steps of the mere rounding that is a key bias's gradient
        assert (cut - whole).norm() < 1e-4 * whole.norm()


def test_only_these_settings_may_change_and_an_error_names_the_others(tmp_path: Path) -> None:
    assert {f"{stage}.{key}" for stage, keys in OTHER.items() for key in keys} | {
        "about", "trackers", "finetune.gradient_checkpointing",
    } == FREE_KEYS  # fmt: skip
    resolved = load_recipe(tiny_recipe(tmp_path)).to_dict()
    RunFolder.create(tmp_path / "run", resolved, Console(quiet=True))._lock.release()
    for changes, names in (
        ({"finetune": {"lr": 1e-5, "micro_batch": 2, "objectives": {"diffusion": 1.0, "output": 1.0}}},
         "finetune.lr, finetune.objectives.output"),
        ({"sample": {"steps": 3, "batch_size": 2}, "fraction": 0.5}, "fraction, sample.steps"),
        ({"distill": None}, "distill"),
    ):  # fmt: skip
        other = load_recipe(tiny_recipe(tmp_path, **changes)).to_dict()  # type: ignore[arg-type]
        with pytest.raises(RunError, match=rf"\(different: {names}\)"):
            RunFolder.create(tmp_path / "run", other, Console(quiet=True), resume=True)


# ---- memory


def mapped(folder: Path) -> list[str]:
    """The files under `folder` that this process has pages of."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split(maxsplit=5)[-1] for line in lines if str(folder) in line})


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_a_checkpoint_is_mapped_while_it_is_read_and_not_after(
    tmp_path: Path, stage: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes share its pages, and none depends on a file that the next checkpoint removes."""
    pipeline = tiny_pipeline(tmp_path, **{stage: {"optimizer": optimizer}})
    asked = iter([None, None, None, 143])
    monkeypatch.setattr(pipeline.run, "stop_requested", lambda: next(asked))
    with pytest.raises(Interrupted):
        getattr(pipeline, stage)()
    seen: dict[str, list[str]] = {}
    pipeline = tiny_pipeline(tmp_path, resume=True, **{stage: {"optimizer": optimizer}})
    read, log = weights.read_pickled, pipeline.run.log

    def reading(path: Path, **options: Any) -> Any:
        state = read(path, **options)
        seen["reading"] = mapped(tmp_path)
        return state

    def logging(record: Any) -> None:
        seen.setdefault("training", mapped(tmp_path))
        log(record)

    monkeypatch.setattr(weights, "read_pickled", reading)
    monkeypatch.setattr(pipeline.run, "log", logging)
    getattr(pipeline, stage)()
    assert [Path(file).name for file in seen["reading"]] == ["000000003.pt"]
    assert seen["training"] == []


def test_the_first_process_checks_a_checkpoint_and_the_others_read_that_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = RunFolder(tmp_path), RunFolder(tmp_path, writer=False)
    for step in (4, 8):
        writer.save_checkpoint("s", step, {"step": step, "x": torch.full((3,), float(step))}, 2)
    newest = tmp_path / "checkpoints/s/000000008.pt"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    hashed: list[str] = []
    check = checkpoints._check

    def checking(path: Path) -> None:
        hashed.append(path.name)
        check(path)

    monkeypatch.setattr(checkpoints, "_check", checking)
    said: list[Any] = []
    main: Any = SimpleNamespace(is_main=True, rank=0, from_main=lambda step: said.append(step) or step,
                                wait=lambda: said.append("wait"))  # fmt: skip
    first = load_checkpoint(writer, "s", main)
    assert hashed == ["000000008.pt", "000000004.pt"]
    assert said == ["wait", 4]  # however long it hashes
    other: Any = SimpleNamespace(is_main=False, rank=1, from_main=lambda step: said[1], wait=lambda: None)
    second = load_checkpoint(reader, "s", other)
    assert len(hashed) == 2
    assert first is not None
    assert second is not None
    assert first["x"].tolist() == second["x"].tolist() == [4.0] * 3
    (tmp_path / "checkpoints/s/000000004.pt").unlink()
    with pytest.raises(
        RunError, match=r"process 1 does not find the s checkpoint of step 4.*shared file system"
    ):
        load_checkpoint(reader, "s", other)


def test_where_files_cannot_be_mapped_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, load = RunFolder(tmp_path), torch.load
    run.save_checkpoint("s", 1, {"step": 1, "x": torch.ones(2)}, 1)

    def without(*arguments: Any, mmap: bool = False, **options: Any) -> Any:
        if mmap:
            raise RuntimeError("unable to mmap 8 bytes from file <x>: No such device (19)")
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", without)
    state = run.load_checkpoint("s")
    assert state is not None
    assert state["x"].tolist() == [1, 1]


class OnDevice(torch.Tensor):
    """A tensor that is somewhere else, of which it is counted how many there are."""

    now = most = 0

    @classmethod
    def like(cls, value: torch.Tensor) -> OnDevice:
        found = value.clone().as_subclass(cls)
        cls.now += 1
        cls.most = max(cls.most, cls.now)
        weakref.finalize(found, cls.gone)
        return found

    @classmethod
    def gone(cls) -> None:
        cls.now -= 1

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).clone()


def test_a_checkpoint_of_a_cut_student_is_gathered_tensor_by_tensor() -> None:
    """Whole parameters, average and moments are more than a device has room for that holds a part of each."""
    parameters = {name: torch.nn.Parameter(torch.full((3,), float(name))) for name in "123"}
    optimizer = torch.optim.AdamW(parameters.values())
    torch.stack(list(parameters.values())).sum().backward()
    optimizer.step()
    saved: list[Any] = []
    stage: Any = SimpleNamespace(
        held=SimpleNamespace(
            takes_all=True, parameters=parameters, whole=lambda name, value: OnDevice.like(value)
        ),
        compute=SimpleNamespace(is_main=True), names=list(parameters),
        writer=SimpleNamespace(save=lambda *given: saved.extend(given)),
    )  # fmt: skip
    course: Any = SimpleNamespace(
        ema=SimpleNamespace(values=dict(parameters)), step=1, seconds=0.0, validation={}, window=[],
        optimizer=SimpleNamespace(state_dict=lambda: {"0": optimizer.state_dict()}),
        bad=SimpleNamespace(skipped=0, in_a_row=0),
    )  # fmt: skip
    _Stage._checkpoint(stage, course)
    assert OnDevice.most == 1
    step, state, given = saved
    assert step == 1
    assert state["parameters"]["2"].tolist() == parameters["2"].tolist()
    assert len(given) == 3 + 3 + 6  # parameters, average, two moments: on the host, and not copied again
    assert {id(value) for value in state["ema"].values()} <= set(map(id, given))
