"""What PyTorch alone holds more of with every step, for comparison with `inside.py`: no code of the package.

    python scripts/chaos/plain_loop.py [STEPS]

Two linear layers, GELU, AdamW and clipping. After every 1,000 steps, cyclic garbage collected, it prints how many small
objects Python holds more than 1,000 steps before.
"""

from __future__ import annotations

import gc
import sys

import torch
from torch import nn


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    held = None
    for step in range(1, steps + 1):
        x = torch.randn(2, 16)
        loss = (model(x) - x).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        if step % 1000 == 0:
            gc.collect()
            now = sys.getallocatedblocks()
            if held is not None:
                print(f"steps {step - 1000} to {step}: {now - held:+d} blocks", flush=True)
            held = now


if __name__ == "__main__":
    main()
