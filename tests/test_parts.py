"""Finished batches of samples: a stop loses what was under way and no more, and processes meet at the start only."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import tiny_dit
from pixart_tools import save_tiny_pipeline
from several import together
from tiny_runs import tiny_pipeline
from torch import Tensor, nn

from grafting import GraftPlan, Replace, diffusion, graft, load_model, processes
from grafting.analysis import headroom
from grafting.errors import DataError, PeerError, RunError
from grafting.evaluation import SampleFile
from grafting.generation import generate
from grafting.parts import Parts
from grafting.runs.lock import FolderLock
from grafting.text_inputs import text_inputs
from grafting.training.compute import Compute

NUM, SIZE = 10, 3  # batches of 3, 3, 3 and 1
COMMON: dict[str, Any] = {"num": NUM, "steps": 2, "batch_size": SIZE, "guidance": 1.0}
PASSES = COMMON["steps"]  # of a batch


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def stop_at(done: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[[int, int], None]:
    """Progress that raises once as many images are drawn."""

    def progress(now: int, total: int) -> None:
        if now >= done:
            raise error

    return progress


def counted(model: nn.Module) -> list[int]:
    """The batch sizes of every pass of `model` from now."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    return seen


def stopped(path: Path, model: nn.Module | None = None, **changes: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        generate(model or tiny_dit(), path, progress=stop_at(6), **{**COMMON, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an undisturbed process."""
    return generate(tiny_dit(), tmp_path_factory.mktemp("whole") / "x.npz", **COMMON)


def same(path: Path, whole: Path) -> bool:
    suffixes = (".npz", ".png")
    return all(path.with_suffix(s).read_bytes() == whole.with_suffix(s).read_bytes() for s in suffixes)


# ---- one process


def test_after_a_stop_only_what_is_missing_is_drawn(tmp_path: Path, whole: Path) -> None:
    stopped(tmp_path / "x.npz")
    kept = [".x.parts", ".x.parts/000000.npy", ".x.parts/000001.npy", ".x.parts/parts.json"]
    assert files(tmp_path) == kept
    (tmp_path / ".x.parts/.000002.npy.abc.tmp").write_bytes(b"killed while it was written")
    model, seen = tiny_dit(), list[tuple[int, int]]()
    passes = counted(model)
    generate(model, tmp_path / "x.npz", progress=lambda *at: seen.append(at), **COMMON)
    assert passes == [3] * PASSES + [1] * PASSES
    assert seen == [(6, NUM), (9, NUM), (10, NUM)]
    assert files(tmp_path) == ["x.npz", "x.png"]
    assert same(tmp_path / "x.npz", whole)


@pytest.mark.parametrize("damage", ["cut", "empty", "of another length", "a link", "noise"])
def test_a_damaged_batch_is_drawn_again(tmp_path: Path, whole: Path, damage: str) -> None:
    stopped(tmp_path / "x.npz")
    part = tmp_path / ".x.parts/000001.npy"
    content = part.read_bytes()
    part.unlink()
    if damage == "a link":
        (tmp_path / "elsewhere").write_bytes(content)
        part.symlink_to(tmp_path / "elsewhere")
    elif damage == "of another length":
        np.save(part, np.zeros((2, 8, 8, 1), np.uint8))
    else:
        part.write_bytes(
            {"cut": content[:-1], "empty": b"", "noise": b"\x93NUMPY\x01\x00" + b"\xff" * 50}[damage]
        )
    model = tiny_dit()
    passes = counted(model)
    generate(model, tmp_path / "x.npz", **COMMON)
    assert passes == [3] * 2 * PASSES + [1] * PASSES
    assert same(tmp_path / "x.npz", whole)


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"steps": 3}, {"guidance": 1.5}, {"num": 9}, {"batch_size": 4}, {"sampler": "ddpm"},
     {"precision": "bf16"}, {"describe": {"model": "y"}}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_batches_of_another_protocol_are_discarded(tmp_path: Path, changes: dict[str, Any]) -> None:
    stopped(tmp_path / "x.npz")
    given = {**COMMON, **changes}
    model, other = tiny_dit(), tiny_dit()
    passes, all_passes = counted(model), counted(other)
    generate(model, tmp_path / "x.npz", **given)
    generate(other, tmp_path / "y.npz", **given)
    assert passes == all_passes
    assert same(tmp_path / "x.npz", tmp_path / "y.npz")


def test_batches_of_another_model_are_discarded(tmp_path: Path) -> None:
    """Of other weights, and of the same weights in another window, which is in no weight."""
    wide, narrow = (
        graft(tiny_dit(), GraftPlan([Replace("mha", [1], "swa", {"window": w})]), seed=0) for w in (8, 1)
    )
    narrow.load_state_dict(wide.state_dict())
    for first, then in ((tiny_dit(seed=1), tiny_dit(seed=2)), (wide, narrow)):
        stopped(tmp_path / "x.npz", first)
        generate(then, tmp_path / "x.npz", **COMMON)
        generate(then, tmp_path / "y.npz", **COMMON)
        assert same(tmp_path / "x.npz", tmp_path / "y.npz")


def test_auto_goes_on_with_the_size_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    monkeypatch.setattr(headroom, "fitting_batch_size", lambda *given, **named: SIZE)
    stopped(tmp_path / "x.npz", batch_size="auto")
    monkeypatch.setattr(headroom, "fitting_batch_size", lambda *given, **named: 7)  # more memory is free now
    generate(tiny_dit(), tmp_path / "x.npz", **{**COMMON, "batch_size": "auto"})
    assert same(tmp_path / "x.npz", whole)


def test_a_protocol_that_can_t_be_written_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    model = tiny_dit()
    passes = counted(model)
    with pytest.raises(DataError, match="plain JSON"):
        generate(model, tmp_path / "x.npz", describe={"at": Path("x")}, **COMMON)
    assert (passes, files(tmp_path)) == ([], [])


def test_another_command_on_the_same_file_is_refused_and_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path / "x.npz")
    (tmp_path / ".x.parts/000000.npy").unlink()
    (tmp_path / ".x.parts/000001.npy").unlink()

    def refuse(lock: FolderLock) -> None:
        raise RunError("in use")

    monkeypatch.setattr(FolderLock, "acquire", refuse)
    with pytest.raises(RunError, match="in use"):
        generate(tiny_dit(), tmp_path / "x.npz", **COMMON)
    assert files(tmp_path) == [".x.parts", ".x.parts/parts.json"]


def test_nothing_is_written_into_a_folder_that_was_taken_away(tmp_path: Path) -> None:
    def take(done: int, total: int) -> None:
        shutil.rmtree(tmp_path / ".x.parts")

    with pytest.raises(RunError, match="removed or taken over"):
        generate(tiny_dit(), tmp_path / "x.npz", progress=take, **COMMON)
    assert files(tmp_path) == []


def test_the_parts_are_no_place_to_write_elsewhere(tmp_path: Path, whole: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".x.parts").symlink_to(tmp_path / "elsewhere")
    stopped(tmp_path / "x.npz")
    assert files(tmp_path / "elsewhere") == []


# ---- runs


def test_a_run_goes_on_inside_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"distill": None, "finetune": None, "sample": {"batch_size": 3}}
    tiny_pipeline(tmp_path, "whole", **settings).all()
    drawn: list[int] = []

    def watched(model: nn.Module, noise: Tensor, *given: Any, **named: Any) -> Tensor:
        drawn.append(len(noise))
        if len(drawn) == 5:  # the student's second batch of three
            raise KeyboardInterrupt
        return diffusion.sample(model, noise, *given, **named)

    monkeypatch.setattr("grafting.generation.sample", watched)
    with pytest.raises(KeyboardInterrupt):
        tiny_pipeline(tmp_path, **settings).all()
    left = tmp_path / "run/samples/.teacher.parts"  # as of an attempt that was killed as it ended
    shutil.copytree(tmp_path / "run/samples/.student.parts", left)
    assert (tmp_path / "run/samples/.student.parts/000000.npy").is_file()
    tiny_pipeline(tmp_path, resume=True, **settings).all()
    assert drawn == [3, 3, 2, 3, 3, 3, 2]
    for who in ("teacher", "student"):
        assert same(tmp_path / f"run/samples/{who}.npz", tmp_path / f"whole/samples/{who}.npz")
    assert files(tmp_path / "run/samples") == files(tmp_path / "whole/samples")


# ---- several processes


def alone_with_its_share(path: Path) -> list[int]:
    """Samples as one of several; from the first batch on no message is let through."""
    model, seen = tiny_dit(), list[int]()

    def refuse(*given: Any, **named: Any) -> None:
        raise AssertionError("a message while samples are drawn")

    def first_pass(module: nn.Module, given: Any) -> None:
        seen.append(len(given[0]))
        for name in ("gather_object", "broadcast_object_list", "all_reduce", "broadcast", "barrier"):
            setattr(dist, name, refuse)

    model.register_forward_pre_hook(first_pass)
    generate(model, path, **COMMON)
    return seen


def test_several_processes_send_no_message_while_they_draw(tmp_path: Path, whole: Path) -> None:
    assert together(3, alone_with_its_share, tmp_path / "x.npz") == [
        [3] * PASSES + [1] * PASSES, [3] * PASSES, [3] * PASSES,
    ]  # fmt: skip
    assert same(tmp_path / "x.npz", whole)
    assert files(tmp_path) == ["x.npz", "x.png"]


def killed(path: Path, who: int, after: int) -> str:
    """Samples as one of several; process `who` is killed as it begins its batch number `after`."""
    model, passes = tiny_dit(), list[int]()

    def count(module: nn.Module, given: Any) -> None:
        passes.append(1)
        if processes.place().rank == who and len(passes) > after * PASSES:
            os.kill(os.getpid(), signal.SIGKILL)

    model.register_forward_pre_hook(count)
    try:
        generate(model, path, **COMMON)
    except PeerError as error:
        return str(error)
    return "went on"


@pytest.mark.parametrize("who", [0, 1])
def test_the_others_end_when_one_dies_and_any_number_goes_on(tmp_path: Path, whole: Path, who: int) -> None:
    found = together(2, killed, tmp_path / "x.npz", who, 1, timeout=60)
    assert found[who] == "died"
    assert found[1 - who].startswith("another process of this run has ended")
    parts = tmp_path / ".x.parts"
    numbers = {int(path.stem) for path in parts.glob("*.npy")}
    assert who in numbers
    assert who + 2 not in numbers
    shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-of-three"))
    model = tiny_dit()
    passes = counted(model)
    generate(model, tmp_path / "x.npz", **COMMON)
    assert len(passes) == PASSES * (4 - len(numbers))
    three = tmp_path.with_name(f"{tmp_path.name}-of-three") / "x.npz"
    assert all(isinstance(found, list) for found in together(3, alone_with_its_share, three))
    for path in (tmp_path / "x.npz", three):
        assert same(path, whole)
        assert files(path.parent) == ["x.npz", "x.png"]


def test_a_process_that_does_not_see_the_folder_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grafting.parts._VISIBLE_SECONDS", 0.0)
    monkeypatch.setattr(Compute, "from_main", lambda self, value: (3, [0, 1], b"{}"))
    parts = Parts(tmp_path / "x.npz", 6, Compute(torch.device("cpu"), "fp32", 1, 2), lambda done: None)
    with pytest.raises(RunError, match="process 1 of 2 does not see"), parts.opened(dict, lambda: 3):
        pass


def test_the_manifest_says_what_the_batches_are_of(tmp_path: Path) -> None:
    stopped(tmp_path / "x.npz")
    found = json.loads((tmp_path / ".x.parts/parts.json").read_text())
    assert found["batch_size"] == SIZE
    assert set(found["of"]) == {"protocol", "batch_size", "shape", "device", "compiled", "vae", "weights",
                                "architecture", "plan", "version"}  # fmt: skip
    generate(tiny_dit(), tmp_path / "x.npz", **COMMON)
    assert SampleFile.open(tmp_path / "x.npz").protocol == found["of"]["protocol"]


# ---- text to image


def test_samples_by_captions_through_a_vae_go_on_too(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = str(save_tiny_pipeline(tmp_path / "pipeline"))
    (tmp_path / "p.txt").write_text("a red cat\na blue dog\na tree\n")
    (tmp_path / "q.txt").write_text("a red cat\na blue dog\na house\n")

    def draw(name: str, prompts: str = "p.txt", **changes: Any) -> list[int]:
        model, captions = text_inputs(load_model(source), prompts=tmp_path / prompts)
        seen = counted(model)
        generate(
            model, tmp_path / name / "x.npz", captions=captions, sampler="dpm++", **{**COMMON, **changes}
        )
        return seen

    whole_passes = draw("whole")
    with pytest.raises(KeyboardInterrupt):
        draw("stopped", progress=stop_at(6))
    shutil.copytree(tmp_path / "stopped", tmp_path / "other")
    assert len(draw("stopped")) == len(whole_passes) // 2
    assert len(draw("other", "q.txt")) == len(whole_passes)
    assert files(tmp_path / "stopped") == ["x.captions.jsonl", "x.npz", "x.png"]
    for name in files(tmp_path / "stopped"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
