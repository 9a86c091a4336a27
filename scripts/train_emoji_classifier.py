"""Train the classifier of emoji groups that evaluation uses, on one CPU core.

    python scripts/train_emoji_classifier.py --data FOLDER --out src/grafting/assets/emoji_classifier.safetensors

--data is what scripts/build_emoji_captions.py made; `held-out` is looked at for the accuracy alone. Half of the images
are people, so batches draw the groups alike, and accuracies are means over the groups.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from grafting.data import load_dataset
from grafting.evaluation.emoji_classifier import GROUPS, EmojiClassifier
from grafting.evaluation.metrics import balanced_accuracy

WHITE = 1.0


def read(folder: Path) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] in [-1, 1] and the numbers of their groups [N]."""
    data = load_dataset(folder)
    names = json.loads((folder / "groups.json").read_text(encoding="utf-8"))["groups"]
    return data.batch(torch.arange(len(data)))[0], torch.tensor([GROUPS.index(name) for name in names])


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not, turned, scaled and moved a little, its colours and sharpness changed, with noise."""
    num = len(x)

    def drawn(low: float, high: float) -> Tensor:
        return torch.rand(num, generator=generator) * (high - low) + low

    angle, size, mirror = drawn(-0.25, 0.25), drawn(0.85, 1.25), (drawn(0, 1) < 0.5).float() * 2 - 1
    cosine, sine = angle.cos() * size, angle.sin() * size
    across = torch.stack([cosine * mirror, -sine, drawn(-0.15, 0.15)], dim=1)
    down = torch.stack([sine * mirror, cosine, drawn(-0.15, 0.15)], dim=1)
    rows = torch.stack([across, down], dim=1)  # [N, 2, 3]
    grid = F.affine_grid(rows, list(x.shape), align_corners=False)
    x = F.grid_sample(x - WHITE, grid, align_corners=False) + WHITE  # what comes in is white
    blurred = F.avg_pool2d(F.pad(x, [1] * 4, mode="replicate"), 3, stride=1)
    x = torch.lerp(x, blurred, drawn(0, 1).square()[:, None, None, None])
    gain = torch.rand(num, 3, 1, 1, generator=generator) * 0.3 + 0.85
    x = (x + 1) * gain - 1
    noise = torch.randn(x.shape, generator=generator) * drawn(0, 0.12)[:, None, None, None]
    return (x + noise).clamp(-1, 1)


@torch.no_grad()
def outputs(model: EmojiClassifier, x: Tensor) -> tuple[Tensor, Tensor]:
    """(features [N, 128], logits [N, 9]) in eval mode."""
    model.eval()
    parts = [model(part) for part in x.split(500)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(arguments.seed)
    (x, y), (held_x, held_y) = read(arguments.data / "train"), read(arguments.data / "held-out")
    model = EmojiClassifier(dropout=arguments.dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=arguments.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.lr, total_steps=arguments.steps, pct_start=0.2
    )
    share = 1.0 / torch.bincount(y, minlength=len(GROUPS)).double()[y]  # every group as often
    started, losses = time.perf_counter(), []
    for step in range(arguments.steps):
        model.train()
        rows = torch.multinomial(share, arguments.batch_size, replacement=True, generator=generator)
        logits = model(augmented(x[rows], generator))[1]
        loss = F.cross_entropy(logits, y[rows], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            held = balanced_accuracy(outputs(model, held_x)[1].numpy(), held_y.numpy())
            seconds = time.perf_counter() - started
            print(
                f"step {step + 1} loss {math.fsum(losses[-100:]) / 100:.4f} held out {held:.4f} {seconds:.0f} s",
                flush=True,
            )

    model.half().float()  # what is measured from here on is what is shipped
    features, logits = outputs(model, x)
    model.feature_scale.copy_(features.double().var(dim=0).mean().sqrt())
    held_logits = outputs(model, held_x)[1]
    metadata = {
        "format": "grafting/emoji-classifier/1",
        "data": "Noto Emoji (Apache-2.0) at 32x32 pixels; groups of emoji-datasource (MIT)",
        "held_out_accuracy": f"{(held_logits.argmax(1) == held_y).double().mean():.4f}",
        "held_out_balanced_accuracy": f"{balanced_accuracy(held_logits.numpy(), held_y.numpy()):.4f}",
        "train_balanced_accuracy": f"{balanced_accuracy(logits.numpy(), y.numpy()):.4f}",
        "held_out_accuracy_by_group": json.dumps({
            name: round((held_logits[held_y == k].argmax(1) == k).double().mean().item(), 3)
            for k, name in enumerate(GROUPS)
        }),
        "training": json.dumps({key: v for key, v in vars(arguments).items() if key not in ("data", "out")}),
    }  # fmt: skip
    state = {
        name: tensor.contiguous()
        if name == "feature_scale" or not tensor.is_floating_point()
        else tensor.half()
        for name, tensor in model.state_dict().items()
    }
    save_file(state, arguments.out, metadata=metadata)
    print(json.dumps({k: v for k, v in metadata.items() if "accuracy" in k}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the packaged classifier of emoji groups.")
    parser.add_argument("--data", type=Path, required=True, help="folder of scripts/build_emoji_captions.py")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
