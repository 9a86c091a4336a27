"""A tiny study, its rows and its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from conftest import tiny_dit

from grafting import save_model
from grafting.console import Console
from grafting.recipes.rows import Claim, Row, Study
from grafting.recipes.table import plan_of

QUIET = Console(quiet=True)
QUICK = ["steps=3", "batch_size=8", "num_validation=4", "warmup=0", "log_every=1", "validate_every=1",
         "checkpoint_every=1", "precision=fp32"]  # fmt: skip


def make_world(folder: Path) -> Path:
    """A tiny teacher of 32 x 32 pixels, tiny data, and a reference."""
    teacher = tiny_dit(input_size=32, patch_size=8, hidden_size=16, depth=4, num_heads=2, num_classes=10)
    save_model(teacher, folder / "model")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, size=(60, 32, 32, 1), dtype=np.uint8)
    np.savez(folder / "data.npz", arr_0=images, arr_1=np.arange(60) % 10)
    return folder


def settings_of(world: Path) -> list[str]:
    found = [f"{stage}.{text}" for stage in ("distill", "finetune") for text in QUICK]
    return [*found, f"model={world / 'model'}", f"data={world / 'data.npz'}", "fraction=1.0", "sample.num=6",
            "sample.steps=1", "distill.fit_samples=8", f"evaluate.reference={world / 'data.npz'}"]  # fmt: skip


def tiny_study(*rows: Row, claims: tuple[Claim, ...] = ()) -> Study:
    return Study("tiny", "Tiny", "A study for tests.", "", rows, claims, paper_baseline=2.0)


def half(**keys: Any) -> dict[str, Any]:
    return {"plan": plan_of("mha", "hyena_x", "interleaved-50", **keys)}
