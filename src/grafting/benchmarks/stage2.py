"""Stage 2: images a second of `finetune` against an eager loop of the published kind, in turns in one process.

That loop: float32, the plain forms of the operators, AdamW without fusion, the average updated tensor by tensor, the
loss read at every step. Both train the same student on the diffusion loss with the same batch.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grafting.benchmarks.models import data_for, teacher_and_student
from grafting.benchmarks.published import published_form
from grafting.benchmarks.timing import ceilings, device_name, kept_memory, synchronize
from grafting.errors import GraftError
from grafting.training.loop import Quiet

PRECISIONS: dict[str, Literal["auto", "fp32", "bf16"]] = {
    "auto": "auto",
    "float32": "fp32",
    "bfloat16": "bf16",
}


def bench_stage2(
    *, size: str = "dit-fashion", batch_size: int = 64, updates: int = 5, repeats: int = 3, device: str = "cpu",
    dtype: str = "auto", mode: str = "eager", micro_batch: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of `updates` steps of either side. mode: eager, compiled or both. Raises GraftError."""
    from grafting.families import family_of
    from grafting.loading import as_device
    from grafting.runs import environment
    from grafting.training.compute import make_compute

    if dtype not in PRECISIONS:
        raise GraftError(f"unknown dtype {dtype!r}: expected one of {', '.join(PRECISIONS)}")
    modes = {"eager": ["eager"], "compiled": ["compiled"], "both": ["eager", "compiled"]}.get(mode)
    if modes is None:
        raise GraftError(f"unknown mode {mode!r}: expected eager, compiled or both")
    place = as_device(device)
    precision = make_compute(place, PRECISIONS[dtype]).precision
    with kept_memory(place):
        _, student = teacher_and_student(size, place)
        data, flops = data_for(student), 3 * family_of(student).flops_per_image(student)
        published = _Published(student, data, batch_size, micro_batch or batch_size, place)
        common = {"batch_size": batch_size, "micro_batch": micro_batch, "precision": precision}
        ours = {
            name: _Ours(student, data, place, {**common, "compile": name == "compiled"}) for name in modes
        }
        sides: dict[str, Any] = {"published": published, **ours}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(repeats + 1):
            for name, side in sides.items():
                found = side.seconds(updates)
                if repeat:  # the first one warms up
                    seconds[name].append(found)
        peaks = {
            "fp32": ceilings(place, torch.float32),
            "bf16": ceilings(place, torch.bfloat16) if precision == "bf16" else {},
        }
    images = updates * batch_size
    base = statistics.median(seconds["published"])
    rows = [
        {
            "loop": name, "precision": kind, "seconds": middle, "images_per_s": images / middle,
            "ratio": base / middle,
            "share_of_matmul": flops * images / middle / peaks[kind]["matmul_flops_per_s"],
            "peak_memory_gb": sides[name].peak_memory_gb,
        }
        for name in sides
        for kind, middle in [("fp32" if name == "published" else precision, statistics.median(seconds[name]))]
    ]  # fmt: skip
    return {
        "benchmark": "stage2", "size": size, "batch_size": batch_size, "micro_batch": micro_batch, "updates": updates,
        "repeats": repeats, "device": device_name(place), "flops_per_image": flops, "ceilings": peaks, "rows": rows,
        "host_syncs_per_step": _host_syncs(ours[modes[0]], updates) if place.type == "cuda" else None,
        "environment": environment(),
    }  # fmt: skip


class _Stamps(Quiet):
    """A journal that notes when it is written to."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.times = device, list[float]()

    def log(self, record: Mapping[str, Any]) -> None:
        synchronize(self.device)
        self.times.append(time.perf_counter())


class _Ours:
    """`finetune` of a copy of the student."""

    def __init__(self, student: nn.Module, data: Any, device: torch.device, config: dict[str, Any]) -> None:
        self.student, self.data, self.device = copy.deepcopy(student), data, device
        self.config = config
        self.peak_memory_gb: float | None = None

    def seconds(self, updates: int) -> float:
        """Of `updates` steps, after as many others: what a stage does once at its start is not counted."""
        from grafting.training.finetuning import finetune

        journal = _Stamps(self.device)
        _reset_peak(self.device)
        finetune(
            self.student, self.data,
            {**self.config, "steps": 2 * updates, "log_every": updates, "num_validation": 0,
             "objectives": {"diffusion": 1.0}},
            journal=journal,
        )  # fmt: skip
        self.peak_memory_gb = _peak(self.device)
        return journal.times[1] - journal.times[0]


class _Published:
    """The loop of the published kind."""

    def __init__(self, student: nn.Module, data: Any, batch: int, micro: int, device: torch.device) -> None:
        self.model, self.data, self.batch, self.device = published_form(student), data, batch, device
        self.micro = micro
        self.peak_memory_gb: float | None = None

    def seconds(self, updates: int) -> float:
        """Of `updates` steps, after one other."""
        model = self.model.train()
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(parameter is not getattr(model, "pos_embed", None))
        trained = [p for p in model.parameters() if p.requires_grad]
        average = [p.detach().clone() for p in trained]
        # On CUDA AdamW by itself takes all tensors at once, on CPUs one after the other.
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
        _reset_peak(self.device)
        self._step(optimizer, trained, average)
        synchronize(self.device)
        started = time.perf_counter()
        for _ in range(updates):
            self._step(optimizer, trained, average)
        synchronize(self.device)
        found = time.perf_counter() - started
        self.peak_memory_gb = _peak(self.device)
        return found

    def _step(self, optimizer: torch.optim.Optimizer, trained: list[Any], average: list[Tensor]) -> float:
        from grafting.diffusion import NUM_TIMESTEPS, training_losses

        total = 0.0
        for rows in torch.randint(len(self.data), (self.batch,)).split(self.micro):
            x0, y = (tensor.to(self.device) for tensor in self.data.batch(rows))
            t = torch.randint(NUM_TIMESTEPS, (len(rows),), device=self.device)
            loss = training_losses(self.model, x0, t, y, torch.randn_like(x0))["loss"].sum() / self.batch
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(trained, 10.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, parameter in zip(average, trained, strict=True):
                mean.mul_(0.9999).add_(parameter, alpha=1 - 0.9999)
        return total


def _host_syncs(ours: _Ours, updates: int) -> float:
    """How often a step waits for the device (torch.cuda.set_sync_debug_mode); the start and log lines count too."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours.seconds(updates)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught) / (2 * updates)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
