"""What strangers write (prompts, labels, names, error texts) is text on every page, and spikes of a loss are marked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_dit
from report_tools import check_inert, make_run
from report_tools import study as make_study

from grafting.report import captions, page, write_report
from grafting.report.study import write_study

HOSTILE = (
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(2)>", '" onload="alert(3)', "' onclick='alert(4)",
    "</style></title></svg><svg onload=alert(5)>", "<!-- --><iframe srcdoc='x'>", "&lt;script&gt;",
    "javascript:alert(6)", "]]><base href=//x>", "\u202e<b>\x00\ud800", "{{7*7}}${7*7}",
    "<a href='javascript:alert(7)'>x</a>",
)  # fmt: skip
EVIL = " ".join(HOSTILE)


def hostile(value: Any) -> Any:
    """The same data with every text replaced, and every key that is not a field's name."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [hostile(item) for item in value]
    return EVIL if isinstance(value, str) else value


def test_names_of_a_run_are_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", name="plain")
    text = EVIL
    recipe = json.dumps(
        {"name": text, "about": text, "model": text, "data": text, "plan": [{"replace": {text: text}}]}
    )
    (run / "recipe.yaml").write_text(recipe)
    shown = check_inert(write_report(run).read_text(encoding="utf-8"))
    assert "could not be made" not in shown.text


def test_an_error_s_text_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(run: Any) -> Any:
        raise ValueError(EVIL)

    monkeypatch.setattr(page.gallery, "samples", failing)
    shown = check_inert(write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8"))
    assert "could not be made: ValueError: <script>alert(1)</script>" in shown.text


def test_a_study_of_hostile_names_is_text(tmp_path: Path) -> None:
    data = make_study(tmp_path)
    for row, text in zip(data["rows"], HOSTILE, strict=False):
        row |= {"name": text, "label": text, "group": text, "error": text, "taken_from": text}
    data |= {
        "name": EVIL, "title": EVIL, "about": EVIL, "findings": list(HOSTILE), "command": EVIL,
        "environment": {EVIL: EVIL}, "protocol": {EVIL: EVIL, "sampler": EVIL},
        "claims": [{"text": EVIL, "verdict": EVIL, "figures": EVIL, "paper": EVIL}],
        "tables": [{"title": EVIL, "note": EVIL, "columns": [[EVIL, EVIL]], "rows": [{EVIL: EVIL}]},
                   {"title": EVIL, "note": EVIL, "columns": [{"key": EVIL, "label": EVIL}], "rows": [{EVIL: EVIL}]}],
    }  # fmt: skip
    data["columns"].append({"key": EVIL, "label": EVIL})
    shown = check_inert(write_study(tmp_path, data).read_text(encoding="utf-8"))
    assert "<script>alert(1)</script>" in shown.text
    data = hostile(data) | {"rows": data["rows"]}
    check_inert(write_study(tmp_path, data).read_text(encoding="utf-8"))


def test_prompts_on_the_page_of_synthetic_pairs_are_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pairs(SimpleNamespace):
        def __len__(self) -> int:
            return len(HOSTILE)

        def batch(self, rows: list[int]) -> tuple[torch.Tensor, None]:
            return torch.zeros(len(rows), 3, 4, 4), None

    pairs: Any = Pairs(
        name=EVIL,
        captions=list(HOSTILE),
        shape=(3, 4, 4),
        protocol={"model": EVIL, EVIL: [EVIL, {EVIL: EVIL}]},
    )
    monkeypatch.setattr(
        captions, "decoder", lambda *given: lambda x: np.zeros((len(x), 4, 4, 3), dtype=np.uint8)
    )
    captions.write_quality_page(pairs, tiny_dit(), tmp_path / "quality.html", tmp_path)
    shown = check_inert((tmp_path / "quality.html").read_text(encoding="utf-8"))
    assert len(shown.all("img")) == len(HOSTILE)
    for text in HOSTILE[:5]:
        assert text in shown.text


def losses(spike: float) -> list[dict[str, Any]]:
    """Sixty steps of each stage, with one step far off."""
    found: list[dict[str, Any]] = []
    for step in range(1, 61):
        loss = (spike if step == 41 else 1.0) + 0.01 * (step % 4)
        found.append({"stage": "distill", "step": step, "lr": 1e-3, "loss": {"a": loss, "b": 1.0 / step}})
        found.append(
            {"stage": "finetune", "step": step, "lr": 1e-3, "loss": loss, "terms": {"diffusion": loss}}
        )
    return found


def test_spikes_of_a_loss_are_named_and_circled(tmp_path: Path) -> None:
    pages = {}
    for spike in (1.0, 9.0):
        run = make_run(tmp_path / str(spike))
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in losses(spike)))
        pages[spike] = check_inert(write_report(run).read_text(encoding="utf-8"))
    assert "loss spike (circled)" not in pages[1.0].text
    assert pages[1.0].text.count("No loss spikes.") == 2
    assert pages[9.0].text.count("1 loss spike (circled) at step 41") == 2
    # a circle is drawn: one element more in a plot of each stage
    drawn = [len(pages[spike].all("path")) + len(pages[spike].all("use")) for spike in (1.0, 9.0)]
    assert drawn[1] >= drawn[0] + 2
