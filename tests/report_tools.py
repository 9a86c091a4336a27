"""A whole run folder and a study, without a model, and a check that a page can load and run nothing."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from grafting.evaluation.samples import write_samples
from grafting.report.html import CSP

LAYERS = (1, 3, 5)
PATHS = [f"blocks.{layer}.attn" for layer in LAYERS]
VOID = {"img", "meta", "br"}


class Page(HTMLParser):
    """Elements, their attributes, and text; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def check_inert(page: str) -> Page:
    """A page that may load and run nothing."""
    parsed = Page(page)
    assert {"http-equiv": "Content-Security-Policy", "content": CSP} in parsed.all("meta")
    for tag, attributes in parsed.elements:
        assert tag not in (
            "script",
            "iframe",
            "object",
            "embed",
            "link",
            "base",
            "form",
            "foreignobject",
            "image",
        )
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#"))
            if key == "style":
                assert "url(" not in (value or "").replace("url(#", "")
    assert "@import" not in page
    return parsed


def metrics(steps: int = 40) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        found.append(
            {
                "stage": "distill",
                "step": step,
                "lr": 1e-3,
                "loss": {p: math.exp(-step / 20) + i for i, p in enumerate(PATHS)},
            }
        )
        found.append(
            {
                "stage": "finetune",
                "step": step,
                "lr": 1e-4,
                "loss": 9.0 if step == 30 else 0.2 + 0.01 * (step % 3),
                "terms": {"diffusion": 0.3, "output": 0.1},
                "grad_norm": None if step == 30 else 1.0,
            }
        )
        if step % 10 == 0:
            found.append(
                {
                    "stage": "distill",
                    "step": step,
                    "event": "validation",
                    "error": dict.fromkeys(PATHS, 0.5 - step / 200),
                }
            )
            found.append({"stage": "finetune", "step": step, "event": "validation", "loss": 0.1})
    return found


def run_state() -> dict[str, Any]:
    edits = [
        {
            "layer": layer,
            "target": "mha",
            "path": path,
            "from": "mha",
            "to": "hyena_x",
            "config": {"kernel_size": 4},
            "init": "donor",
            "params": [1000, 1030],
            "flops": [200.0, 150.0],
        }
        for layer, path in zip(LAYERS, PATHS, strict=True)
    ]
    comparison = {
        "metrics": {
            "fd": {"a": 20.0, "b": 25.0, "difference": 5.0, "ratio": 1.25},
            "label_accuracy": {"a": 0.8, "b": 0.79, "difference": -0.01, "ratio": 0.9875},
        },
        "protocol": {
            "num_samples": 60,
            "sampler": "dpm++",
            "steps": 10,
            "reference": {"name": "train", "hash": "ab" * 32, "num": 60000},
        },
        "differs": {"model": ["teacher", "student"]},
    }
    return {
        "version": 1,
        "stages": {
            "graft": {
                "num_layers": 6,
                "model": {"params": [100_000, 100_090], "flops_per_image": [10_000.0, 9_850.0]},
                "edits": edits,
            },
            "distill": {
                "start_error": {
                    "random": dict.fromkeys(PATHS, 1.1),
                    "copied": dict.fromkeys(PATHS, 0.9),
                    "fitted": dict.fromkeys(PATHS, 0.6),
                },
                "final_error": dict.fromkeys(PATHS, 0.3),
                "best_step": dict.fromkeys(PATHS, 40),
                "rested": {PATHS[0]: 30},
                "steps": 40,
                "image_visits": 640,
                "flops": 6.4e6 + 3 * 450 * 640,
                "seconds": 65.0,
                "share_of_pretraining": 0.004,
            },
            "finetune": {
                "steps": 40,
                "image_visits": 640,
                "flops": 640 * (3 * 9850 + 10_000),
                "seconds": 120.0,
                "trained_params": 100_090,
                "ema_decay": 0.75,
                "validation": {"40": 0.1},
                "skipped_steps": 0,
                "share_of_pretraining": 0.005,
            },
            "sample": {"seconds": {"teacher": 3.0, "student": 2.0}, "num": 60},
            "evaluate": comparison,
        },
        "environment": {"python": "3.12", "torch": "2.9", "threads": 2},
    }


def make_run(folder: Path, *, name: str = "half", about: str = "Half becomes hyena_x.") -> Path:
    """A whole run folder, without a model."""
    recipe = {
        "name": name,
        "about": about,
        "model": "dit-fashion",
        "data": "fashion-10",
        "plan": [
            {"replace": {"target": "mha", "layers": list(LAYERS), "with": {"hyena_x": {"kernel_size": 4}}}}
        ],
        "distill": {"mode": "one-pass", "losses": {"mha": "l1"}},
        "finetune": {"objectives": {"diffusion": 0.1, "output": 1.0}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "plan.yaml").write_text("version: 1\nentries: []\n")
    state = run_state()
    (folder / "run.json").write_text(json.dumps(state))
    evaluation = {"comparison": state["stages"]["evaluate"]}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in metrics()) + '{"stage": "fine'
    )
    labels = np.arange(60) % 10
    for seed, who in enumerate(("teacher", "student")):
        images = np.random.default_rng(seed).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
        write_samples(
            folder / "samples" / f"{who}.npz", images, labels, {"seed": 0, "steps": 10, "model": who}
        )
    return folder


def study(tmp_path: Path) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for seed, name in enumerate(("base", "half", "<b>all</b>")):
        images = np.random.default_rng(seed).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
        write_samples(tmp_path / "rows" / f"{seed}.npz", images, np.arange(20) % 10, {"seed": 0})
        rows.append({"name": name, "label": name, "fd": 20.0 + seed, "flops": 1.0 - seed / 10, "std": {"fd": 0.5},
                     "samples": f"rows/{seed}.npz", "seconds": 60.0 * seed})  # fmt: skip
    rows.append(
        {"name": "failed", "label": "failed", "fd": None, "flops": float("nan"), "samples": "rows/none.npz"}
    )
    return {
        "name": "ablation", "title": "An ablation", "about": "What each part gives.", "rows": rows,
        "columns": [{"key": "fd", "label": "Fréchet distance"}, {"key": "flops", "label": "FLOPs"}],
        "findings": ["Half is enough."], "environment": {"torch": "2.9"}, "scatter": {"x": "flops", "y": "fd"},
    }  # fmt: skip
