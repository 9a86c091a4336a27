"""What `--resume` may change of a recipe, and what of a checkpoint stays in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import tiny_pipeline, tiny_recipe

from grafting import load_graft
from grafting.console import Console
from grafting.errors import RunError
from grafting.recipes import load_recipe
from grafting.recipes.settings import FREE_KEYS
from grafting.runs import RunFolder
from grafting.training.loop import Interrupted

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
