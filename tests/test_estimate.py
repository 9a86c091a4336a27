"""Dry runs: memory that is counted without values is what a run holds, and a recipe is rehearsed without weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_dit

from grafting import GraftPlan, Replace, cli, graft
from grafting.analysis import estimate
from grafting.analysis.memory import peak_bytes, weight_bytes
from grafting.training.config import FinetuneConfig
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

    monkeypatch.setattr(sys, "argv", ["graft", "run", str(recipe), "--dry-run", "--set", "model=gone.pt"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "--set model=arch:DiT-XL/2" in capsys.readouterr().err
