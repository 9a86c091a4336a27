"""Pretrain `dit-fashion`, the embedded class-conditional DiT, on the 60,000 training images of Fashion-MNIST.

    python scripts/pretrain_dit_fashion.py --data IDX_FOLDER --out FOLDER [--start WEIGHTS.pt] [--steps N]

Resumable: run the same command again after a stop and it goes on from the last checkpoint in --out. Every draw is a
function of (seed, step), so an interrupted run does what an uninterrupted one does. At the end `--out` holds
`model.safetensors` (the EMA weights in fp16) and `model.json` (architecture, and what was run): a folder that
`load_model` reads. The shipped one is src/grafting/assets/dit-fashion.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grafting import diffusion, draws
from grafting.data.fashion import load_full, to_pixels
from grafting.formats import weights
from grafting.models.dit import DiT, DiTConfig

CONFIG = DiTConfig(
    input_size=32, patch_size=4, in_channels=1, hidden_size=128, depth=12, num_heads=4, num_classes=10
)
LABEL_DROPOUT = 0.1


def learning_rate(step: int, total: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def timesteps(seed: int, index: Tensor, focus: float) -> Tensor:
    """Uniform timesteps, a fraction `focus` of them from a logit-normal that favours the middle of the schedule."""
    uniform = draws.integers(seed, "t", index, diffusion.NUM_TIMESTEPS)
    z = draws.normal(seed, "t-focus", index, (1,))[:, 0]
    middle = (
        (torch.sigmoid(0.9 * z - 0.3) * diffusion.NUM_TIMESTEPS).long().clamp(0, diffusion.NUM_TIMESTEPS - 1)
    )
    return torch.where(draws.uniform(seed, "t-kind", index) < focus, middle, uniform)


def save(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train-images-idx3-ubyte.gz and labels"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="weights to continue from (.pt in the published form)")
    parser.add_argument("--start-visits", type=int, default=0, help="images that those weights saw")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--ema", type=float, default=0.9985)
    parser.add_argument("--focus", type=float, default=0.5, help="share of timesteps drawn from the middle")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--save-every", type=int, default=200)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.out / "checkpoint.pt"
    device = torch.device(arguments.device)

    images, labels = load_full(arguments.data, "train")
    x_all, y_all = to_pixels(images).to(device), torch.as_tensor(labels, dtype=torch.int64, device=device)
    torch.manual_seed(arguments.seed)
    model = DiT(CONFIG).to(device)
    if arguments.start:
        from grafting.loading import load_model

        model.load_state_dict(load_model(str(arguments.start), num_heads=CONFIG.num_heads).state_dict())
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    first, losses, seconds = 0, [], 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, first, seconds = state["ema"], state["step"], state["seconds"]
        print(f"resumed at step {first}", flush=True)
    forward: nn.Module = torch.compile(model) if arguments.compile else model  # type: ignore[assignment]

    for step in range(first, arguments.steps):
        started = time.perf_counter()
        position = torch.arange(step * arguments.batch, (step + 1) * arguments.batch)
        epochs, offsets = position // len(x_all), position % len(x_all)
        order = torch.cat([
            draws.permutation(arguments.seed, "order", int(epoch), len(x_all))[offsets[epochs == epoch]]
            for epoch in epochs.unique()
        ])  # fmt: skip
        x0, y = x_all[order.to(device)], y_all[order.to(device)]
        index = position.to(device)
        t = timesteps(arguments.seed, index, arguments.focus)
        noise = draws.normal(arguments.seed, "noise", index, tuple(x0.shape[1:]))
        y = torch.where(draws.uniform(arguments.seed, "drop", index) < LABEL_DROPOUT, CONFIG.num_classes, y)
        with torch.autocast(device.type, torch.bfloat16, enabled=not arguments.fp32):
            output = forward(diffusion.add_noise(x0, t, noise), t, y)
        loss = diffusion.loss_from_output(output, x0, t, noise)["loss"].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.lr)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(arguments.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 1 - decay)
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
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema,
                "step": step + 1, "seconds": seconds,
            })  # fmt: skip

    half = {name: value.half() for name, value in ema.items() if name != "pos_embed"}
    weights.write_safetensors(arguments.out / "model.safetensors", half)
    weights.write_json(
        arguments.out / "model.json",
        {
            "format": "grafting",
            "version": 1,
            "architecture": {"family": "dit", **CONFIG.to_dict()},
            "pretraining": {
                "data": "Fashion-MNIST, 60,000 training images",
                "image_visits": arguments.start_visits + arguments.steps * arguments.batch,
                "visits_before_start": arguments.start_visits,
                "steps": arguments.steps,
                "batch": arguments.batch,
                "lr": arguments.lr,
                "schedule": "cosine to zero",
                "ema": arguments.ema,
                "focus": arguments.focus,
                "seed": arguments.seed,
                "precision": "fp32" if arguments.fp32 else "bf16 autocast",
                "seconds": round(seconds),
                "torch": torch.__version__,
            },
        },
    )


if __name__ == "__main__":
    main()
