"""What a plan changes on the device at hand: latency and peak memory of one forward pass, before and after.

Axes: B batch, N tokens, D width.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from grafting import draws
from grafting.analysis.costs import base_of, plan_cost
from grafting.analysis.memory import memory_source, peak_bytes, weight_bytes
from grafting.errors import GraftError
from grafting.families import family_of
from grafting.plan import GraftPlan
from grafting.selectors import Locality
from grafting.surgery import Edit, explain, graft, record_of
from grafting.training.acceleration import compiled

WARM_UP = 3  # passes that are not timed: caches, choice of kernels, the allocator
Work = Callable[[], object]


def measure_plan(
    model: nn.Module, plan: GraftPlan | None = None, locality: Locality | None = None, *,
    batch_size: int = 1, repeat: int = 20, warm_up: int = WARM_UP, seed: int = 0, compile: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Time one forward pass without gradients before and after a plan, in turns, and its peak memory.

    model: on the device and in the dtype to measure. plan: None for the plan that an edited model carries; its base is
    then built with random weights, for values matter to neither figure.
    Latencies are medians in milliseconds with quartiles beside; `speedup` is before / after. `ceiling` is Amdahl's:
    the speedup if the replaced operators cost nothing at all, from their share of the FLOPs and of the measured time;
    a plan that rearranges or drops blocks has none, for that gains time too.
    `operators` times one layer of each row alone. On the CPU `cpu_ms` are the medians of the processor time that this
    process got, and `cpu_speedup` their ratio: on a machine shared with other work they say more than the clock.
    warm_up: passes of each that are not timed. compile: the blocks of both models, and the operators timed alone, by
    `torch.compile` (what can't be compiled is an error: the figure would be of something else).
    Memory is the weights and what the first pass that is not timed adds to them.
    Raises GraftError.
    """
    if batch_size < 1 or repeat < 1 or warm_up < 1:
        raise GraftError(f"batch_size={batch_size}, repeat={repeat}, warm_up={warm_up}: all are at least 1")
    device = next(model.parameters()).device
    if device.type == "meta":
        raise GraftError("a model on the meta device has nothing to measure; load it on a real device")
    before, after, plan = _pair(model, plan, locality, seed)
    changes = explain(before, plan, locality)
    edits = changes.edits
    passes = [_forward(m.eval(), batch_size, seed) for m in (before, after)]
    blocks = [block for m in (before, after) for block in family_of(m).compilable(m)]
    with compiled(blocks, compile, device):
        if compile:  # so that the compiler's own memory is not taken for the model's
            for work in passes:
                work()
        memory = [
            weight_bytes(m) + peak_bytes(work, device)
            for m, work in zip((before, after), passes, strict=True)
        ]
        times, cpu = _clocks(passes, repeat, device, warm_up - 1)
    latency, spent = ([statistics.median(t) for t in found] for found in (times, cpu))
    counted = plan_cost(before, plan, locality)
    at = [{(site.kind, site.layer): site.donor for site in family_of(m).sites(m)} for m in (before, after)]
    rows = []
    for row in counted["rows"]:
        edit = _edit_of(row, edits)
        if edit is None:  # of the depth, which has no operator to time alone
            continue
        x = _tokens(edit, batch_size, seed, next(model.parameters()))
        operators = [found[edit.site.kind, edit.site.layer] for found in at]
        with compiled(operators, compile, device):
            alone = time_in_turns([_call(module, x) for module in operators], repeat, device, warm_up)
        milliseconds = [statistics.median(t) for t in alone]
        rows.append({
            "target": row["target"], "operator": row["operator"], "layers": row["layers"], "layer_ms": milliseconds
        })  # fmt: skip
    flops = counted["model"]["flops_per_image"]
    flops_share = sum(edit.before.total for edit in edits) / flops[0]
    time_share = sum(row["layer_ms"][0] * len(row["layers"]) for row in rows) / latency[0]
    return {
        "what": "one forward pass without gradients",
        "device": device_name(device),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "compiled": compile,
        "repeat": repeat,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "latency_ms": latency,
        "quartiles_ms": [_quartiles(t) for t in times],
        "speedup": latency[0] / latency[1],
        **({"cpu_ms": spent, "cpu_speedup": spent[0] / spent[1]} if device.type == "cpu" else {}),
        "flops_speedup": flops[0] / flops[1],
        **({"ceiling": {
            "flops_share": flops_share, "from_flops": amdahl(flops_share),
            "time_share": time_share, "from_time": amdahl(time_share),
        }} if edits and not (changes.groups or changes.pruned) else {}),
        "operators": rows,
        "peak_memory_bytes": memory,
        "memory": memory_source(device),
    }  # fmt: skip


def time_in_turns(
    works: Sequence[Work], repeat: int, device: torch.device, warm_up: int = WARM_UP
) -> list[list[float]]:
    """Milliseconds of `repeat` calls of each of `works`, which take turns so that a busy moment hits all alike."""
    return _clocks(works, repeat, device, warm_up)[0]


def _clocks(
    works: Sequence[Work], repeat: int, device: torch.device, warm_up: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Milliseconds by the clock, and of processor time of this process."""
    for work in works:
        for _ in range(warm_up):
            work()
    times: list[list[float]] = [[] for _ in works]
    cpu: list[list[float]] = [[] for _ in works]
    for _ in range(repeat):
        for number, work in enumerate(works):
            synchronize(device)
            started, before = time.perf_counter(), time.process_time()
            work()
            synchronize(device)
            times[number].append(1e3 * (time.perf_counter() - started))
            cpu[number].append(1e3 * (time.process_time() - before))
    return times, cpu


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_name(device: torch.device) -> str:
    """The device as a person knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def amdahl(share: float) -> float | None:
    """The most that can be gained by making `share` of the work free: 1 / (1 - share); None for all of it."""
    return 1 / (1 - share) if share < 1 else None


def _pair(
    model: nn.Module, plan: GraftPlan | None, locality: Locality | None, seed: int
) -> tuple[nn.Module, nn.Module, GraftPlan]:
    """The model before, after, and the plan between them."""
    if plan is not None:
        return model, graft(model, plan, seed=seed, locality=locality, share=True), plan
    record = record_of(model)
    if record is None:
        raise GraftError("nothing to compare: this model was not edited; give a plan")
    first = next(model.parameters())
    return base_of(model, device=first.device).to(first.dtype), model, record.plan


def _forward(model: nn.Module, batch_size: int, seed: int) -> Work:
    family, device = family_of(model), next(model.parameters()).device
    index = torch.arange(batch_size, device=device)
    x = draws.normal(seed, "latency", index, family.sample_shape(model))
    t = torch.full((batch_size,), 500, device=device)
    cond = family.example_condition(model, batch_size)

    def work() -> object:
        with torch.no_grad():
            return family.predict(model, x, t, cond)

    return work


def _call(operator: nn.Module, x: torch.Tensor) -> Work:
    def work() -> object:
        with torch.no_grad():
            return operator(x)

    return work


def _tokens(edit: Edit, batch_size: int, seed: int, like: torch.Tensor) -> torch.Tensor:
    index = torch.arange(batch_size, device=like.device)
    return draws.normal(seed, "latency/tokens", index, (edit.site.num_tokens, edit.site.width)).to(like.dtype)


def _edit_of(row: dict[str, Any], edits: Sequence[Edit]) -> Edit | None:
    return next((e for e in edits if e.site.kind == row["target"] and e.site.layer in row["layers"]), None)


def _quartiles(times: Sequence[float]) -> list[float]:
    if len(times) < 2:
        return [times[0], times[0]]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return [low, high]
