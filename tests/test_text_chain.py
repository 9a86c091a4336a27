"""The way of a text-to-image model through the commands alone: pairs, both stages, pipeline, images, upload."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pixart_tools import save_tiny_pipeline

import grafting
from grafting import draws
from grafting.data import load_dataset

PROMPTS = ["the red cat", "a small blue house under the green moon", "sun", "a dog near the sea"]
RECIPE = """
name: chain
model: {base}
data: {pairs}
plan:
- replace: {{target: mha, layers: "1,3", with: hyena_x}}
distill: {{steps: 4, batch_size: 4, num_validation: 0, fit_samples: 8, precision: fp32, log_every: 2}}
finetune:
  steps: 3
  batch_size: 4
  num_validation: 0
  precision: fp32
  gradient_checkpointing: true
  lora: {{rank: 2, alpha: 2}}
sample: {{num: 4, steps: 2, sampler: dpm++, guidance: 4.5, batch_size: 4}}
evaluate: null
"""
Command = Callable[..., str]

pytestmark = pytest.mark.usefixtures("quiet_transformers")


def latents_by_diffusers(folder: Path, texts: list[str], noise: torch.Tensor) -> torch.Tensor:
    from diffusers import PixArtSigmaPipeline

    own = PixArtSigmaPipeline.from_pretrained(folder)
    own.set_progress_bar_config(disable=True)
    height, width = (2 * side for side in noise.shape[-2:])
    return own(
        texts, latents=noise, output_type="latent", use_resolution_binning=False, height=height, width=width,
        num_inference_steps=2, guidance_scale=4.5, clean_caption=False,
    ).images  # fmt: skip


def test_from_prompts_to_an_uploaded_pipeline(
    tmp_path: Path, graft_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, pairs, run, out = (tmp_path / name for name in ("base", "pairs", "run", "pipeline"))
    save_tiny_pipeline(base)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    graft_command(
        "synthesize", base, "--prompts", tmp_path / "prompts.txt", "--num", 12, "--out", pairs, "--steps", 2,
        "--height", 16, "--width", 24, "--batch-size", 4, "--shard-size", 8, "--seed", 3,
    )  # fmt: skip
    data = load_dataset(pairs)
    assert data.shape == (4, 8, 12)  # not square
    x, cond = data.batch([0, 1, 2, 3])
    assert len(set(cond.mask.sum(dim=1).tolist())) == 4  # every caption of the batch is of another length
    noise = draws.normal(3, "synthesize/noise", torch.arange(4), (4, 8, 12))
    assert torch.equal(x, latents_by_diffusers(base, PROMPTS, noise))  # before any edit: bit for bit

    (tmp_path / "recipe.yaml").write_text(RECIPE.format(base=base, pairs=pairs))
    said = graft_command("run", tmp_path / "recipe.yaml", "--out", run)
    assert f"report: {run / 'report.html'}" in said
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert (stages["distill"]["steps"], stages["finetune"]["steps"]) == (4, 3)
    for stage in ("distill", "finetune"):
        assert stages[stage]["memory"]["peak_bytes"] > 0
    assert json.loads((run / "graft" / "graft.json").read_text())["lora"]["rank"] == 2
    drawn = np.load(run / "samples" / "student.npz")["arr_0"]
    assert drawn.shape == (4, 16, 24, 3)

    graft_command("export", run, "--format", "pipeline", "--merge", "--out", out)
    assert "lora" not in json.loads((out / "transformer" / "graft.json").read_text())
    for path in (tmp_path / "base", pairs):
        path.rename(path.with_name(f"moved-{path.name}"))  # the pipeline needs neither
    pipeline = grafting.load_pipeline(out)
    pipeline.set_progress_bar_config(disable=True)
    noise = draws.normal(0, "sample/start", torch.arange(4), (4, 8, 12))
    images = pipeline(
        PROMPTS, latents=noise, use_resolution_binning=False, height=16, width=24, num_inference_steps=2,
        guidance_scale=4.5, clean_caption=False, output_type="np",
    ).images  # fmt: skip
    assert np.abs(255 * images - drawn).max() < 4  # the same images: what the run drew from its captions
    (tmp_path / "two.txt").write_text("a red moon\nthe cat\n")
    graft_command(
        "sample", out, "--prompts", tmp_path / "two.txt", "--num", 2, "--steps", 2, "--sampler", "dpm++",
        "--out", tmp_path / "two.npz", "--height", 24, "--width", 16,
    )  # fmt: skip
    assert np.load(tmp_path / "two.npz")["arr_0"].shape == (2, 24, 16, 3)

    card = (out / "README.md").read_text()
    for words in (
        'grafting.load_pipeline("FOLDER")', '"hyena_x"', "| parameters |", "stage 1, distillation | 4 | 4 |",
        "stage 2, finetuning | 3 | 4 |", "rank 2", "![Samples of the base and of this model](samples.png)",
        f"2. `{PROMPTS[1]}`", "dpm++", "Base needed beside this folder: no",
    ):  # fmt: skip
        assert words in card, words
    assert str(tmp_path) not in "".join(p.read_text() for p in out.rglob("*.json")) + card
    calls: list[Any] = []

    class Hub:
        def create_repo(self, repo: str, **options: Any) -> None:
            calls.append((repo, options))

        def upload_folder(self, **options: Any) -> None:
            calls.append(options)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert graft_command("push", out, "me/chain", "--private") == "pushed: https://huggingface.co/me/chain\n"
    assert calls == [
        ("me/chain", {"private": True, "exist_ok": True}), {"repo_id": "me/chain", "folder_path": str(out)}
    ]  # fmt: skip
    for folder, said in (
        (run, "is a run folder, with checkpoints and logs"), (run / "graft", "needs its base, which is a local folder"),
        (tmp_path / "moved-pairs", "holds no graft"),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match=f"exit 2: error: .*{said}"):
            graft_command("push", folder, "me/chain")
    with pytest.raises(AssertionError, match="has no LoRA adapters to merge"):
        graft_command("export", out, "--format", "graft", "--merge", "--out", tmp_path / "again")
