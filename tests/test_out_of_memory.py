"""Memory that runs out is an error in a line that says what to do, and is foretold where it can be counted."""

from __future__ import annotations

import io
import traceback
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import tiny_pipeline, tiny_recipe

from grafting import needs, pipeline, rehearsal
from grafting.analysis.memory import gigabytes, weight_bytes
from grafting.cli.entry import main
from grafting.console import Console
from grafting.errors import GraftError, OutOfMemoryError
from grafting.families import family_of
from grafting.out_of_memory import explained, said_of
from grafting.pipeline import Pipeline
from grafting.recipes import load_recipe
from grafting.runs import RunFolder, run_status

PLAN = [{"replace": {"target": "mha", "layers": [1], "with": "swa"}}]
TOO_MUCH = 2**46  # bytes of float32 that no machine here has


def test_it_is_recognised_whoever_says_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(TOO_MUCH)
    found = said_of(caught.value)
    assert found is not None
    assert found.startswith("DefaultCPUAllocator: ")
    assert said_of(torch.OutOfMemoryError("CUDA out of memory. Tried 1 GiB.\nMore.")) == (
        "CUDA out of memory. Tried 1 GiB."
    )
    assert said_of(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert said_of(MemoryError())
    assert said_of(RuntimeError("shapes do not fit")) is None
    assert said_of(GraftError("out of memory")) is None


def test_what_the_failed_work_held_is_given_back_and_its_lines_are_kept() -> None:
    seen: list[weakref.ref[Any]] = []

    def work() -> None:
        held = torch.ones(3)
        seen.append(weakref.ref(held))
        torch.empty(TOO_MUCH)

    with pytest.raises(OutOfMemoryError, match=r"^a stage ran out of memory \(.*\); do less$") as caught, explained(
        "a stage", "do less"
    ):  # fmt: skip
        work()
    assert seen[0]() is None
    assert "torch.empty(TOO_MUCH)" in "".join(traceback.format_exception(caught.value))
    with pytest.raises(ZeroDivisionError), explained("a stage", "do less"):
        raise ZeroDivisionError


@pytest.mark.parametrize("stage", ["distill", "finetune", "sample"])
def test_a_stage_without_memory_says_what_to_set_and_goes_on(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        torch.empty(TOO_MUCH)

    run = tiny_pipeline(tmp_path)
    with monkeypatch.context() as without:
        without.setattr(pipeline, "generate" if stage == "sample" else stage, fail)
        with pytest.raises(OutOfMemoryError) as caught:
            run.all()
    remedy = {
        "distill": "lower distill.micro_batch (samples of a pass: 4 now)",
        "finetune": "lower finetune.micro_batch (samples of a pass: 4 now), or say shard: full and give --processes",
        "sample": "lower sample.batch_size, or give auto",
    }[stage]
    assert str(caught.value).startswith(f"{stage} on cpu ran out of memory (DefaultCPUAllocator: ")
    assert str(caught.value).endswith(f"); {remedy}; --resume goes on")
    assert caught.value.exit_code == 2
    assert run_status(run.run.path)["error"] == str(caught.value)
    changes: dict[str, Any] = {stage: {"batch_size" if stage == "sample" else "micro_batch": 2}}
    tiny_pipeline(tmp_path, resume=True, **changes).all()
    assert run_status(run.run.path)["state"] == "finished"


def test_elsewhere_it_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import grafting.cli.entry as entry

    monkeypatch.setattr(entry, "app", lambda **_: torch.empty(TOO_MUCH))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: out of memory: DefaultCPUAllocator")
    assert line.count("\n") == 1


def test_remedies_leave_out_what_is_set_or_cannot_be() -> None:
    def of(**tune: Any) -> str:
        recipe = load_recipe({"model": "m", "data": "d", "plan": PLAN, "finetune": {"batch_size": 8, **tune}})
        return needs.remedies(recipe, "finetune", SimpleNamespace(has_checkpointing=True), 2)  # type: ignore[arg-type]

    micro = "lower finetune.micro_batch (samples of a pass: 4 now)"
    assert of() == f"{micro}, or say gradient_checkpointing: true, or say shard: full, or say lora"
    assert of(optimizer="muon") == f"{micro}, or say gradient_checkpointing: true, or say lora"
    one = {"micro_batch": 1, "gradient_checkpointing": True, "shard": "full", "lora": {}}
    assert of(**one) == "take a device with more memory"


def said(folder: Path, monkeypatch: pytest.MonkeyPatch, memory: int, **changes: Any) -> tuple[str, list[str]]:
    """What `check` says on a device of so many bytes, and which stages were counted in earnest."""
    counted: list[str] = []

    def expected(recipe: Any, stage: str, *rest: Any) -> Any:
        counted.append(stage)
        return count(recipe, stage, *rest)

    count = needs.expected
    text = io.StringIO()
    recipe = load_recipe(tiny_recipe(folder, **changes))
    with monkeypatch.context() as patch:
        patch.setattr(needs, "total_bytes", lambda device: memory)
        patch.setattr(needs, "expected", expected)
        Pipeline(recipe, RunFolder(folder / "new", Console(text))).check(to_the_end=True)
    return text.getvalue(), counted


def test_a_stage_that_will_hardly_fit_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large: dict[str, Any] = {"finetune": {"batch_size": 60}}
    cut: dict[str, Any] = {"finetune": {"batch_size": 60, "micro_batch": 2}}
    needed = []
    for changes in (large, cut):
        recipe = load_recipe(tiny_recipe(tmp_path, **changes))
        teacher = Pipeline(recipe, RunFolder(tmp_path / "new", Console(quiet=True))).teacher
        parts = needs.expected(recipe, "finetune", teacher, torch.device("cpu"), 1)
        assert parts is not None
        needed.append(parts["total"])
    memory = sum(needed) // 2
    assert said(tmp_path, monkeypatch, 10**9, **large) == ("", [])  # far from it: nothing is counted
    text, counted = said(tmp_path, monkeypatch, memory, **large)
    assert "finetune" in counted
    lines = text.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(
        f"warning: finetune will hardly fit: it needs about {gigabytes(needed[0])} of memory, and cpu has "
        f"{gigabytes(memory)}; lower finetune.micro_batch (samples of a pass: 60 now)"
    )
    assert said(tmp_path, monkeypatch, memory, **cut)[0] == ""


def test_a_stage_says_what_it_needs_where_it_may_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, text = tiny_pipeline(tmp_path), io.StringIO()
    run.run.console = Console(text)
    monkeypatch.setattr(needs, "total_bytes", lambda device: 10**9)
    run.distill()
    assert "needs about" not in text.getvalue()
    parts = needs.expected(run.recipe, "finetune", run.teacher, torch.device("cpu"), 1)
    assert parts is not None
    monkeypatch.setattr(needs, "total_bytes", lambda device: 2 * parts["total"])
    run.finetune()
    assert f"finetune: needs about {gigabytes(parts['total'])} of memory (weights " in text.getvalue()
    found = {
        stage: (run.run.result(stage) or {})["memory"]["estimated_bytes"] for stage in ("distill", "finetune")
    }
    assert found == {"distill": None, "finetune": parts["total"]}


@pytest.mark.parametrize("stage", ["distill", "finetune", "sample"])
def test_the_bound_is_above_the_count(tmp_path: Path, stage: str) -> None:
    for recipe in (load_recipe(tiny_recipe(tmp_path)), load_recipe("demo"), load_recipe("demo-text")):
        teacher = Pipeline(recipe, RunFolder(tmp_path / "new", Console(quiet=True))).teacher
        parts = needs.expected(recipe, stage, teacher, torch.device("cpu"), 1)
        assert parts is not None
        assert needs._bound(recipe, stage, teacher, 1) > 2 * parts["total"]
        assert rehearsal.stage_memory is needs.stage_memory  # one count for a dry run and before a run


def test_a_student_that_is_cut_is_counted_so(tmp_path: Path) -> None:
    tune = {"precision": "bf16", "objectives": {"output": 1.0}}
    recipes = [
        load_recipe(tiny_recipe(tmp_path, finetune={**tune, "shard": shard})) for shard in ("none", "full")
    ]
    teacher = Pipeline(recipes[0], RunFolder(tmp_path / "new", Console(quiet=True))).teacher
    whole, cut = (needs.expected(recipe, "finetune", teacher, torch.device("cpu"), 4) for recipe in recipes)
    assert whole is not None
    assert cut is not None
    assert cut["optimizer"] == whole["optimizer"] // 4
    assert cut["average"] == whole["average"] // 4
    plan = recipes[0].graft_plan
    student = needs.student_of(recipes[0], "finetune", teacher, plan)
    own = weight_bytes(teacher, student) - weight_bytes(teacher)
    assert whole["weights"] > weight_bytes(teacher, student)  # the teacher's copy in bf16 is in it, and stays
    assert whole["weights"] - cut["weights"] == own - own // 4
    assert cut["activations and gradients"] < whole["activations and gradients"]
    assert cut["total"] == sum(size for name, size in cut.items() if name != "total")
    assert family_of(teacher).has_checkpointing is False
