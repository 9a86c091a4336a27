"""Train the Fashion-MNIST classifier that evaluation uses, on the full training set, on one CPU core.

    python scripts/train_classifier.py --data FOLDER --out src/grafting/assets/fashion_classifier.safetensors

Augmentation is a random shift of up to 2 pixels: no flips, since features should tell left from right.
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

from grafting.data.dataset import ImageLabelDataset
from grafting.data.sources import load_dataset
from grafting.evaluation.fashion_classifier import FashionClassifier


def shift(x: Tensor, generator: torch.Generator, max_shift: int = 2) -> Tensor:
    """Shift each image [N, 1, H, W] by up to `max_shift` pixels each way; what comes in is black, -1."""
    num, _, height, width = x.shape
    padded = F.pad(x, [max_shift] * 4, value=-1.0)
    offsets = torch.randint(0, 2 * max_shift + 1, (2, num, 1), generator=generator)
    rows = offsets[0] + torch.arange(height)  # [N, H]
    columns = offsets[1] + torch.arange(width)  # [N, W]
    return padded[torch.arange(num)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


@torch.no_grad()
def outputs(model: FashionClassifier, data: ImageLabelDataset, num: int = 500) -> tuple[Tensor, Tensor]:
    """Return (features [N, 128], logits [N, 10]) in float32, in eval mode."""
    model.eval()
    parts = [model(data.batch(range(i, min(i + num, len(data))))[0]) for i in range(0, len(data), num)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(dim=1) == labels).double().mean().item()


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(arguments.seed)
    data = load_dataset(f"fashion:{arguments.data}:train")
    test = load_dataset(f"fashion:{arguments.data}:test")
    model = FashionClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=arguments.weight_decay)
    steps_per_epoch = len(data) // arguments.batch_size
    num_steps = arguments.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.lr, total_steps=num_steps, pct_start=0.2
    )
    started = time.perf_counter()
    for epoch in range(arguments.epochs):
        model.train()
        order = torch.randperm(len(data), generator=generator)
        losses = []
        for step in range(steps_per_epoch):
            x, y = data.batch(order[step * arguments.batch_size : (step + 1) * arguments.batch_size])
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
                logits = model(shift(x, generator))[1]
            loss = F.cross_entropy(logits.float(), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        seconds = time.perf_counter() - started
        score = accuracy(outputs(model, test)[1], test.y)
        mean = math.fsum(losses) / len(losses)
        print(f"epoch {epoch + 1:2d} loss {mean:.4f} test accuracy {score:.4f} {seconds:.0f} s", flush=True)

    model.half().float()  # what is measured from here on is what is shipped
    features, logits = outputs(model, data)
    model.feature_scale.copy_(features.double().var(dim=0).mean().sqrt())
    test_accuracy = accuracy(outputs(model, test)[1], test.y)
    metadata = {
        "format": "grafting/fashion-classifier/1",
        "data": "Fashion-MNIST, 60,000 training images (Zalando Research, MIT licence)",
        "test_accuracy": f"{test_accuracy:.4f}",
        "train_accuracy": f"{accuracy(logits, data.y):.4f}",
        "training": json.dumps(
            {key: value for key, value in vars(arguments).items() if key not in ("data", "out")}
        ),
    }
    state = {
        name: tensor.contiguous()
        if name == "feature_scale" or not tensor.is_floating_point()
        else tensor.half()
        for name, tensor in model.state_dict().items()
    }
    save_file(state, arguments.out, metadata=metadata)
    print(f"test accuracy {test_accuracy:.4f}; wrote {arguments.out.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the packaged Fashion-MNIST classifier.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the four IDX files")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bf16 autocast")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
