"""Batch sizes of sampling: images do not depend on them; `auto` fits the free memory, and halves what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_dit
from torch import Tensor, nn

from grafting.analysis import estimate, headroom
from grafting.analysis.headroom import fitting_batch_size, free_bytes, total_bytes
from grafting.errors import GraftError, RunError
from grafting.generation import generate
from grafting.needs import stage_memory
from grafting.recipes import load_recipe

CPU = torch.device("cpu")


class Small:
    """A model's forward on a device with room for `room` samples; sizes that were asked for in `asked`."""

    def __init__(self, model: nn.Module, room: int) -> None:
        self.forward, self.room, self.asked = model.forward, room, list[int]()

    def __call__(self, x: Tensor, *given: Any) -> Tensor:
        self.asked.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nMore words.")
        found: Tensor = self.forward(x, *given)
        return found


def images(path: Path, model: nn.Module | None = None, **changes: Any) -> np.ndarray:
    generate(
        model or tiny_dit(),
        path / "x.npz",
        **{"num": 10, "steps": 2, "sampler": "ddpm", "guidance": 1.0, **changes},
    )
    with np.load(path / "x.npz") as found:
        return found["arr_0"].astype(int)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_an_image_is_the_same_in_any_batch(tmp_path: Path, sampler: str, guidance: float) -> None:
    """But for rounding: a step of 1/255 where a value lies between two."""
    found = [
        images(tmp_path, sampler=sampler, guidance=guidance, batch_size=size) for size in (1, 3, 10, "auto")
    ]
    for other in found[1:]:
        assert np.abs(found[0] - other).max() <= 1
        assert (found[0] != other).mean() < 0.01
    assert np.abs(found[0][0] - found[0][4]).max() > 1  # same label, another image


def test_a_batch_that_does_not_fit_is_halved_and_the_smaller_one_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_dit()
    wanted = images(tmp_path, model)
    small = Small(model, 3)
    monkeypatch.setattr(model, "forward", small)
    monkeypatch.setattr(headroom, "UNCOUNTED", 5)  # its copy without values has no more room than itself
    seen: list[tuple[int, int]] = []
    found = images(tmp_path, model, batch_size="auto", num=10, progress=lambda *at: seen.append(at))
    assert np.abs(found - wanted).max() <= 1
    assert small.asked == [
        5,
        2,
        2,
        2,
        2,
        1,
        1,
        2,
        2,
        2,
        2,
        1,
        1,
    ]  # two steps of each; two equal batches of five
    assert seen == [(5, 10), (10, 10)]


@pytest.mark.parametrize(
    ("size", "told"), [(4, "4 at once .*lower batch_size, or give auto"), ("auto", "1 at once")]
)
def test_what_does_not_fit_at_all_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: Any, told: str
) -> None:
    model = tiny_dit()
    monkeypatch.setattr(model, "forward", Small(model, 0))
    with pytest.raises(GraftError, match=told) as caught:
        images(tmp_path, model, batch_size=size)
    assert "Tried to allocate 1.00 GiB.)" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_size_follows_the_counted_need_and_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_dit()
    stand_in = estimate.meta_copy(model)

    def need(size: int) -> int:
        return estimate.sample_memory(stand_in, stand_in, size, 1.5, "fp32")["activations"]

    def fits(num: int = 1000, **changes: Any) -> int:
        return fitting_batch_size(model, num, CPU, guidance=1.5, precision="fp32", **changes)

    for size in (7, 15):
        monkeypatch.setattr(
            headroom, "free_bytes", lambda device, size=size: int(need(size + 1) / headroom.SHARE)
        )
        found = fits(100_000)
        assert found == size + 1
        assert need(found) <= headroom.SHARE * headroom.free_bytes(CPU) < need(found + 1)  # type: ignore[operator]
    counted = headroom._need(model, 1.5, "fp32")
    monkeypatch.setattr(headroom, "_need", lambda *_: counted)  # a second each
    held = estimate.weight_bytes(model)
    assert fits(held=held) < fits()
    assert fits(processes=2) <= fits() // 2
    monkeypatch.setattr(headroom, "free_bytes", lambda device: 0)
    assert fits() == 1
    monkeypatch.setattr(headroom, "free_bytes", lambda device: 10**15)
    assert fits(100_000) == headroom.MOST_ELSEWHERE
    assert fits(101) == 17  # six equal batches rather than five of 20 and one of 1
    assert fits(10, processes=4) == 3  # all processes draw
    assert fits(2, processes=4) == 1
    monkeypatch.setattr(headroom, "free_bytes", lambda device: None)
    assert fits() == 16


def test_what_can_t_be_counted_gets_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(headroom, "sample_memory", refuse)
    assert fitting_batch_size(tiny_dit(), 160, CPU, guidance=1.5, precision="fp32") == headroom.UNCOUNTED


def group(folder: Path, limit: str, used: int, cache: str, names: tuple[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(limit)
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cache}\n")


def test_free_memory_is_the_least_of_the_system_s_and_the_control_groups(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    assert free_bytes(CPU, proc, groups) is None
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 8000 kB\n")
    assert free_bytes(CPU, proc, groups) == 8000 * 1024
    second = ("memory.max", "memory.current")
    (proc / "self/cgroup").write_text("0::/a/b\n")
    group(groups / "a/b", "max\n", 10, "inactive_file 3", second)
    assert free_bytes(CPU, proc, groups) == 8000 * 1024
    group(groups / "a", "5000\n", 4000, "inactive_file 300", second)
    assert free_bytes(CPU, proc, groups) == 1300
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (proc / "self/cgroup").write_text(
        "5:devices:/\n4:cpu,memory:/elsewhere/c\n"
    )  # the group as seen from outside
    group(groups / "memory", "7000\n", 6500, "total_inactive_file 100", first)
    assert free_bytes(CPU, proc, groups) == 600
    group(groups / "memory", "7000\n", 7500, "total_inactive_file 100", first)
    assert free_bytes(CPU, proc, groups) == 0
    assert free_bytes(torch.device("meta"), proc, groups) is None
    real = free_bytes(CPU)
    assert real is None or 0 < real < 2**50


def test_memory_of_a_container_is_its_limit(tmp_path: Path) -> None:
    """Not that of the machine, by which a dry run in a container or a job of Slurm would promise too much."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    machine = total_bytes(CPU, proc, groups)
    assert machine is None or machine > 2**20
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text("0::/job/task\n")
    names = ("memory.max", "memory.current")
    group(groups / "job/task", "max\n", 10, "inactive_file 3", names)
    assert total_bytes(CPU, proc, groups) == machine
    group(groups / "job", "1000000\n", 999000, "inactive_file 0", names)
    assert total_bytes(CPU, proc, groups) == 1_000_000  # whatever is used of it
    (proc / "self/cgroup").write_text("4:memory:/\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group(
        groups / "memory", f"{2**63 - 4096}\n", 10, "total_inactive_file 3", names
    )  # the first version's "max"
    if machine is not None:
        assert total_bytes(CPU, proc, groups) == machine


def test_recipes_take_auto(tmp_path: Path) -> None:
    recipe = load_recipe("demo", ["sample.batch_size=auto"])
    assert recipe.sample.batch_size == "auto"
    model = estimate.meta_copy(tiny_dit())
    least = stage_memory(recipe, "sample", model, recipe.graft_plan, "fp32")
    one = load_recipe("demo", ["sample.batch_size=1"])
    assert least == stage_memory(one, "sample", model, recipe.graft_plan, "fp32")
    for wrong in ("all", "0", "2.5"):
        with pytest.raises(RunError, match=r"sample\.batch_size"):
            load_recipe("demo", [f"sample.batch_size={wrong}"])
