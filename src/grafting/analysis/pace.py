"""How fast a device does the parts of a run: each kind of operator timed alone, and one optimizer step.

The stages are put together from that. Not in it: loading, writing checkpoints, decoding latents, measuring samples,
exchange between processes. Axes: B batch, N tokens, D width.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grafting import operators
from grafting.analysis.estimate import as_it_learns, learning_sites, new_parameters
from grafting.analysis.latency import synchronize
from grafting.families import Site, family_of
from grafting.plan import Parallelize, Replace
from grafting.surgery import edited_groups, edited_sites
from grafting.training.compute import make_compute
from grafting.training.config import DistillConfig, FinetuneConfig, Optimization
from grafting.training.loop import EMA
from grafting.training.optimizers import make_optimizer
from grafting.training.trained import trained_parameters

LARGE, FEWER = 2e11, 1024  # FLOPs of a pass above which a CPU is timed on fewer tokens, and how many
ENOUGH = 0.05  # seconds that a timed pass should take; its batch grows until then
REPEATS = 5


class _Branch(nn.Module):
    """An operator as blocks have it: norm, shift and scale, the operator, gate, residual. [B, N, D] -> [B, N, D]."""

    def __init__(self, operator: nn.Module, width: int) -> None:
        super().__init__()
        self.operator = operator
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = torch.addcmul(c, self.norm(x), 1 + c)
        return torch.addcmul(x, c, self.operator(h))


@dataclass(frozen=True)
class Pace:
    """Seconds per image of one branch, forward and with backward."""

    forward: float
    both: float


@dataclass
class Stopwatch:
    """Paces of the operators of models on the meta device, each measured once on `device`."""

    device: torch.device
    precision: str  # "fp32" or "bf16"
    dtype: torch.dtype
    batch_size: int  # the most that is tried at once
    _paces: dict[tuple[Any, ...], Pace] = field(default_factory=dict)
    _update: dict[str, float] = field(default_factory=dict)

    def of(self, site: Site, frozen: bool = False) -> Pace:
        """The pace of the operator at a site; frozen: its backward pass gives the gradient of its input alone."""
        shapes = tuple(tuple(p.shape) for p in site.donor.parameters())
        key = (site.operator, str(site.donor), shapes, site.num_tokens, site.width, frozen)
        if key not in self._paces:
            self._paces[key] = self._measure(site, frozen)
        return self._paces[key]

    def model(self, model: nn.Module, up_to: int | None = None, frozen: bool = False) -> Pace:
        """The pace of a whole model, or of its blocks up to one (inclusive). What is not at a site goes by FLOPs.

        frozen: with gradients of what a plan put into it only.
        """
        family = family_of(model)
        sites = [s for s in family.sites(model) if up_to is None or s.layer <= up_to]
        edited = edited_sites(model)
        paces = [self.of(site, frozen and site.path not in edited) for site in sites]
        here = Pace(sum(p.forward for p in paces), sum(p.both for p in paces))
        counted = sum(s.cost.total for s in sites)
        rest = family.flops_per_image(model) - sum(s.cost.total for s in family.sites(model))
        share = rest / counted if counted and up_to is None else 0.0
        return Pace(here.forward * (1 + share), here.both * (1 + share))

    def group(self, model: nn.Module, group: Site) -> Pace:
        """The pace of blocks side by side: that of their operators one after another. The rest goes by FLOPs."""
        inside = [site for site in family_of(model).sites(model) if site.layer in group.layers]
        paces = [self.of(site) for site in inside]
        more = group.cost.total / sum(site.cost.total for site in inside)
        return Pace(more * sum(p.forward for p in paces), more * sum(p.both for p in paces))

    def update(self, site: Site, config: Optimization, average: bool) -> float:
        """Seconds per parameter of one optimizer step, clipping and, with `average`, the moving average."""
        key = f"{config.optimizer}/{average}"
        if key not in self._update:
            operator = _materialized(site.donor, self.device, self.dtype)
            parameters = [p for p in operator.parameters() if p.requires_grad]
            named = {str(i): p for i, p in enumerate(parameters)}
            optimizer, ema = make_optimizer(operator, [parameters], config), EMA(named, 0.99)

            def step() -> None:
                for parameter in parameters:
                    parameter.grad = torch.ones_like(parameter)
                nn.utils.clip_grad_norm_(parameters, config.clip)
                optimizer.step()
                if average:
                    ema.update(named, 1)

            step()
            self._update[key] = self._time(step) / sum(p.numel() for p in parameters)
        return self._update[key]

    def _measure(self, site: Site, frozen: bool) -> Pace:
        branch = _Branch(_materialized(site.donor, self.device, self.dtype), site.width)
        branch.requires_grad_(not frozen)
        tokens, more = self._tokens(site)
        compute = make_compute(self.device, self.precision)

        def forward(x: Tensor, c: Tensor) -> None:
            with torch.no_grad(), compute.autocast():
                branch(x, c)

        def both(x: Tensor, c: Tensor) -> None:
            with compute.autocast():
                output = branch(x, c)
            output.float().sum().backward()
            for p in branch.parameters():
                p.grad = None

        return Pace(*(more * self._per_image(work, tokens, site.width) for work in (forward, both)))

    def _tokens(self, site: Site) -> tuple[int, float]:
        """How many tokens to time an operator on, and how many times as much work all of them are."""
        if self.device.type != "cpu" or site.cost.total < LARGE or site.num_tokens <= FEWER:
            return site.num_tokens, 1.0
        share, cost = FEWER / site.num_tokens, site.cost
        if isinstance(site.donor, operators.Operator):
            if getattr(site.donor, "num_tokens", None) is not None:  # tied to its number of tokens
                return site.num_tokens, 1.0
            less = operators.cost_of(site.donor, num_tokens=FEWER, dim=site.width).total
        else:  # attention goes by the square of the tokens, its projections and MLPs by their number
            less = cost.operator * (share**2 if site.kind == "mha" else share) + cost.featurizer * share
        return FEWER, cost.total / less

    def _per_image(self, work: Callable[[Tensor, Tensor], None], tokens: int, width: int) -> float:
        size = 1
        while True:
            x = torch.randn(size, tokens, width, device=self.device, dtype=self.dtype)
            c = torch.randn(size, 1, width, device=self.device, dtype=self.dtype)
            x.requires_grad_(torch.is_grad_enabled())
            work(x, c)
            seconds = self._time(lambda x=x, c=c: work(x, c))  # type: ignore[misc]
            if seconds >= ENOUGH or size >= self.batch_size:
                return seconds / size
            size = min(self.batch_size, size * (2 if seconds > ENOUGH / 4 else 4))

    def _time(self, work: Callable[[], None]) -> float:
        """The least of some times: what else the machine does only adds to them, most of all to short ones."""
        times = []
        for _ in range(REPEATS):
            synchronize(self.device)
            started = time.perf_counter()
            work()
            synchronize(self.device)
            times.append(time.perf_counter() - started)
        return min(times)


def distill_seconds(
    watch: Stopwatch, teacher: nn.Module, student: nn.Module, config: DistillConfig, processes: int = 1
) -> float:
    """Seconds of stage 1: steps, validations, and the errors and fit before the first."""
    student = as_it_learns(student)
    sites = learning_sites(student)
    if not sites:
        return 0.0
    taps = watch.model(teacher, up_to=max(max(site.layers, default=site.layer) for site in sites)).forward
    paces = [watch.group(student, s) if s.layers else watch.of(s) for s in sites]
    learn, apply = sum(p.both for p in paces), sum(p.forward for p in paces)
    params = sum(p.numel() for p in new_parameters(student))
    visits = config.steps * config.batch_size
    if config.mode == "cached":  # every process fills a cache of its own
        passes: float = min(config.cache_samples, visits)
    else:
        passes = visits / config.reuse / processes
    update = params * watch.update(family_of(teacher).sites(teacher)[0], config, False)
    entries: list[Replace | Parallelize] = [entry for _, entry in edited_sites(student).values()]
    entries += [entry for _, entry in edited_groups(student).values()]
    copied = any(entry.init == "donor" for entry in entries if entry.train)
    fitted = copied and config.fit_readout
    # Beside those on the way: of random starts, of copied and of fitted ones, at step 0 and at the end.
    passes_held_out = math.ceil(config.steps / config.validate_every) + 3 + copied + fitted
    held_out = config.num_validation / processes * passes_held_out
    fit = config.fit_samples * fitted
    trained = learn * visits / processes + config.steps * update
    return taps * passes + trained + (taps + apply) * (held_out + fit)


def finetune_seconds(
    watch: Stopwatch, teacher: nn.Module, student: nn.Module, config: FinetuneConfig, processes: int = 1,
    adapters: int = 0,
) -> float:  # fmt: skip
    """Seconds of stage 2: steps and validations. adapters: LoRA's parameters, which the student does not have here."""
    family, lora = family_of(student), config.lora is not None
    what = "operators" if lora else config.train
    pace = watch.model(student, frozen=what == "operators")
    weights = {str(name): weight for name, weight in config.objectives.items()}
    matched = weights.get("output", 0) > 0 or weights.get("features", 0) > 0
    again = pace.forward if config.gradient_checkpointing else 0.0
    tokens = family.sites(student)[0].num_tokens
    more = 1 + 2.0 * tokens * adapters / family.flops_per_image(student)  # what the adapters add to a pass
    passes = (pace.both + again) * more + (watch.model(teacher).forward if matched else 0.0)
    params = adapters + sum(p.numel() for p in trained_parameters(family, student, what).values())
    update = params * watch.update(family.sites(student)[0], config, True)
    held_out = config.num_validation / processes * (config.steps / config.validate_every + 1)
    return config.steps * (passes * config.batch_size / processes + update) + held_out * pace.forward


def sample_seconds(watch: Stopwatch, *models: nn.Module, num: int, steps: int, guidance: float) -> float:
    """Seconds of sampling `num` images of each model; decoding latents is not in it."""
    forward = sum(watch.model(model).forward for model in models)
    return num * steps * (1 if guidance == 1 else 2) * forward


def _materialized(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of a module on the meta device with small random weights on a real one."""
    copied = copy.deepcopy(module).to_empty(device=device)
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)
            else:
                tensor.zero_()
    return copied.to(dtype)
