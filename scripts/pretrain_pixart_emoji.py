"""Pretrain `pixart-emoji`, the embedded text-to-image model: diffusers' PixArt class, small, on emoji and their names.

    python scripts/build_emoji_captions.py --emoji FOLDER --encoder FOLDER --out DATA
    python scripts/pretrain_pixart_emoji.py --data DATA/train --out FOLDER [--steps N]

Resumable: run the same command again after a stop and it goes on from the last checkpoint in --out. Every draw is a
function of (seed, step). At the end --out holds `transformer/` in diffusers' layout (the averaged weights) and
`pretraining.json`: what was run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grafting import diffusion, draws
from grafting.conditioning import choose, move
from grafting.data import load_dataset
from grafting.families import family_of
from grafting.formats import weights
from grafting.training.config import FinetuneConfig
from grafting.training.optimizers import make_optimizer

# 12 blocks of width 144 at 64 tokens of 4x4 pixels: 4.3M parameters.
ARCHITECTURE: dict[str, Any] = {
    "num_attention_heads": 4, "attention_head_dim": 36, "in_channels": 3, "out_channels": 6, "num_layers": 12,
    "cross_attention_dim": 144, "sample_size": 32, "patch_size": 4, "caption_channels": 384,
    "interpolation_scale": 1, "use_additional_conditions": False,
}  # fmt: skip
CAPTION_DROPOUT = 0.1


def learning_rate(step: int, total: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def rows_of(seed: int, position: Tensor, size: int) -> Tensor:
    """Which images the global positions [B] are: every epoch in an order of its own."""
    epochs, offsets = position // size, position % size
    return torch.cat([
        draws.permutation(seed, "order", int(epoch), size)[offsets[epochs == epoch]] for epoch in epochs.unique()
    ])  # fmt: skip


def balanced(groups: list[str]) -> Tensor:
    """Which images an epoch shows: those of the largest group (people in all skin tones) once, all others twice."""
    largest = max(sorted(set(groups)), key=groups.count)
    rows = torch.arange(len(groups))
    others = rows[torch.tensor([group != largest for group in groups])]
    return torch.cat([rows, others])


def flipped(x: Tensor, seed: int, index: Tensor) -> Tensor:
    """Half of the images mirrored; flags and signs too, which a model of this size can't tell apart anyway."""
    turn = draws.uniform(seed, "flip", index) < 0.5
    return torch.where(turn[:, None, None, None], x.flip(-1), x)


def save(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="caption dataset of the training emoji")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    parser.add_argument(
        "--compile", action="store_true", help="compile the blocks (needs a C++ compiler on CPUs)"
    )
    parser.add_argument("--save-every", type=int, default=100)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint, device, seed = arguments.out / "checkpoint.pt", torch.device(arguments.device), arguments.seed

    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(seed)
    model: Any = PixArtTransformer2DModel(**ARCHITECTURE).to(device)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    family, data = family_of(model), load_dataset(arguments.data)
    shown = balanced(json.loads((Path(arguments.data) / "groups.json").read_text(encoding="utf-8"))["groups"])
    images, captions = data.batch(torch.arange(len(data)))
    images, captions = images.to(device), move(captions, device)
    parameters = dict(model.named_parameters())
    ema = {name: value.detach().clone() for name, value in parameters.items()}
    optimizer = make_optimizer(
        model, [list(parameters.values())], FinetuneConfig(optimizer="muon", lr=arguments.lr)
    )
    first, seconds, losses = 0, 0.0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, first, seconds = state["ema"], state["step"], state["seconds"]
        print(f"resumed at step {first}", flush=True)

    if arguments.compile:
        for block in model.transformer_blocks:
            block.compile()
    for step in range(first, arguments.steps):
        started = time.perf_counter()
        position = torch.arange(step * arguments.batch, (step + 1) * arguments.batch)
        rows, index = shown[rows_of(seed, position, len(shown))].to(device), position.to(device)
        x0 = flipped(images[rows], seed, index)
        caption = type(captions)(*(part[rows] for part in captions))
        dropped = draws.uniform(seed, "drop", index) < CAPTION_DROPOUT
        caption = choose(dropped, caption.null, caption)
        t = draws.integers(seed, "t", index, diffusion.NUM_TIMESTEPS)
        noise = draws.normal(seed, "noise", index, tuple(x0.shape[1:]))
        with torch.autocast(device.type, torch.bfloat16, enabled=not arguments.fp32):
            output = family.predict(model, diffusion.add_noise(x0, t, noise), t, caption)
        loss = diffusion.loss_from_output(output, x0, t, noise)["loss"].mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.set_learning_rate(learning_rate(step, arguments.steps, arguments.lr))
        if torch.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
        decay = min(arguments.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in parameters.values()], 1 - decay)
        losses.append(loss.detach())
        seconds += time.perf_counter() - started
        if (step + 1) % 50 == 0:
            mean = torch.stack(losses[-50:]).mean().item()
            print(
                f"step {step + 1}/{arguments.steps} loss {mean:.5f} {seconds / (step + 1):.2f} s/step",
                flush=True,
            )
            if not math.isfinite(mean):
                raise SystemExit("the loss is no longer finite; the last checkpoint is kept")
        if (step + 1) % arguments.save_every == 0 or step + 1 == arguments.steps:
            save(checkpoint, {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema, "step": step + 1,
                "seconds": seconds,
            })  # fmt: skip

    model.load_state_dict({**model.state_dict(), **ema})
    model.half().save_pretrained(arguments.out / "transformer")
    weights.write_json(arguments.out / "pretraining.json", {
        "data": "Noto emoji at 32x32 pixels and their names", "images": len(data),
        "parameters": sum(p.numel() for p in parameters.values()),
        "image_visits": arguments.steps * arguments.batch, "steps": arguments.steps, "batch": arguments.batch,
        "optimizer": "muon", "lr": arguments.lr, "schedule": "cosine to zero", "ema": arguments.ema, "seed": seed,
        "precision": "fp32" if arguments.fp32 else "bf16 autocast", "compiled": arguments.compile,
        "seconds": round(seconds), "torch": torch.__version__,
    })  # fmt: skip


if __name__ == "__main__":
    main()
