"""What a run will need, before it runs: memory by accounting, time from a few passes timed on the device.

Memory: the stages' own tensors are counted on stand-ins that allocate and compute nothing, at the real size of a pass
and precision. Time: each kind of operator is timed alone, forward and backward, and the stages are put together from
that. Both are estimates; docs/costs.md compares them with runs. Axes: B batch, N tokens, D width.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from grafting.analysis.memory import LiveBytes, weight_bytes
from grafting.depth import open_groups
from grafting.families import Site, Tap, family_of
from grafting.lora import is_lora, lora_of
from grafting.models.stacked import StackedLinear
from grafting.surgery import edited_groups, edited_sites
from grafting.training.acceleration import frozen_copy
from grafting.training.compute import Compute
from grafting.training.config import DistillConfig, FinetuneConfig, Optimization
from grafting.training.initialization import ReadoutFit, run_on
from grafting.training.pupils import pupils_of
from grafting.training.starts import in_turns
from grafting.training.trained import trained_parameters


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device: its shapes, none of its values."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()
    }
    memo |= {id(b): b.detach().to("meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)


def distill_memory(
    teacher: nn.Module, student: nn.Module, config: DistillConfig, batch_size: int, precision: str, *,
    at_once: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Bytes of stage 1 at its peak, by what they hold. Models on the meta device; `batch_size` of one pass.

    Tensors that the student shares with the teacher count once; with `reuse`, so do the taps that are held. at_once: as
    if the graphs of all operators were alive together and went backward as one, which stage 1 does not do.
    """
    student = as_it_learns(student)
    places = {
        pupil.path: pupil.site.path for pupil in pupils_of(family_of(student), student, teacher, config)
        if pupil.parameters
    }  # fmt: skip
    paths, new, reference = list(places), new_parameters(student), _frozen(teacher, precision)
    held = config.num_validation * _sample_bytes(teacher)

    def step(teacher: nn.Module, student: nn.Module, x: Tensor, t: Tensor, cond: Any) -> None:
        with _autocast(precision):
            taps = family_of(teacher).taps(teacher, x, t, cond, paths)
        rows = config.reuse_passes * config.batch_size if config.reuse > 1 else 0
        held = [
            part.new_empty(rows, *part.shape[1:]) for tap in taps.values() for part in tap if part is not None
        ]
        losses = []
        for path in paths:
            tap = taps.pop(path)
            with _autocast(precision):
                output = run_on(student.get_submodule(places[path]), tap)
                loss = (output.float() - tap.output.float()).abs().mean()
            if at_once:
                losses.append(loss)
            else:
                loss.backward()
        if at_once:
            torch.stack(losses).sum().backward()
        del held

    parts = {
        "weights": weight_bytes(teacher, student, reference),
        "optimizer": _optimizer_bytes(student, new, config),
        "best so far and held-out batches": (_bytes(new) if config.keep_best else 0) + held,
        "activations and gradients": _peak(step, reference, student, set(map(id, new)), batch_size),
    }  # fmt: skip
    before = (
        parts["weights"] + _bytes(new) + held + _fit_peak(teacher, student, config, batch_size, precision)
    )
    if (more := before - sum(parts.values())) > 0:
        parts["more for the readout fits, before the first step"] = more
    return _with_total(parts)


def finetune_memory(
    teacher: nn.Module, student: nn.Module, config: FinetuneConfig, batch_size: int, precision: str, *,
    processes: int = 1,
) -> dict[str, int]:  # fmt: skip
    """Bytes of stage 2 at its peak, by what they hold. Models on the meta device; `batch_size` of one pass.

    A student with LoRA adapters trains those and its new operators. processes: over how many the held-out samples are
    shared out and, with `shard: full`, the student is cut; blocks that are gathered are not counted.
    """
    ways = processes if config.shard == "full" else 1
    family = family_of(student)
    trained = _trained(student, config)
    weights = {str(name): weight for name, weight in config.objectives.items()}
    features, output = weights.get("features", 0) > 0, weights.get("output", 0) > 0
    layers = family.feature_layers(student) if features else ()
    reference = _frozen(teacher, precision) if features or output else teacher

    def step(teacher: nn.Module, student: nn.Module, x: Tensor, t: Tensor, cond: Any) -> None:
        if config.gradient_checkpointing:
            family.set_checkpointing(student, True)
        with _autocast(precision):
            wanted: Any = None
            with torch.no_grad():
                if features or output:
                    wanted = family.predict_with_features(teacher, x, t, cond, layers)
            given, found = family.predict_with_features(student, x, t, cond, layers)
            loss = given.float().square().mean()
            for layer, value in found.items():
                loss = loss + (value.float() - wanted[1][layer].float()).square().mean()
        loss.backward()

    weights_held = weight_bytes(teacher, student, reference)
    if ways > 1:  # all of it, also what it shares with the teacher while it is whole
        weights_held = weight_bytes(teacher, reference) + weight_bytes(student) // ways
    return _with_total({
        "weights": weights_held,
        "optimizer": _optimizer_bytes(student, trained, config) // ways,
        "average": sum(p.numel() * max(4, p.element_size()) for p in trained) // ways,
        "held-out batches": -(-config.num_validation // processes) * _sample_bytes(student),
        "activations and gradients": _peak(step, reference, student, set(map(id, trained)), batch_size, ways),
    })  # fmt: skip


def sample_memory(
    teacher: nn.Module, student: nn.Module, batch_size: int, guidance: float, precision: str
) -> dict[str, int]:
    """Bytes of sampling at its peak; decoding latents is not in it. Models on the meta device."""
    family = family_of(student)

    def step(teacher: nn.Module, student: nn.Module, x: Tensor, t: Tensor, cond: Any) -> None:
        with torch.no_grad(), _autocast(precision):
            if guidance == 1:
                family.predict(student, x, t, cond)
            else:
                family.predict_guided(student, x, t, cond, guidance)

    return _with_total({
        "weights": weight_bytes(teacher, student),
        "activations": _peak(step, teacher, student, set(), batch_size),
    })  # fmt: skip


def checkpoint_bytes(student: nn.Module, config: Optimization) -> int:
    """Bytes on disk of one checkpoint of a stage of these settings."""
    if isinstance(config, DistillConfig):
        student = as_it_learns(student)
        new = new_parameters(student)
        return _bytes(new) * (2 if config.keep_best else 1) + _optimizer_bytes(student, new, config)
    trained = _trained(student, config)
    average = sum(p.numel() * max(4, p.element_size()) for p in trained)
    return _bytes(trained) + average + _optimizer_bytes(student, trained, config)


def cache_bytes(student: nn.Module, config: DistillConfig, processes: int = 1) -> int:
    """Bytes on disk of the stored activations of `mode: cached`: each of the processes stores them all."""
    if config.mode != "cached":
        return 0
    samples = min(config.cache_samples, config.steps * config.batch_size)
    per_sample = sum(2 * (2 * site.num_tokens + 1) * site.width for site in learning_sites(student))
    return processes * samples * per_sample


# ---- stand-ins


def _peak(
    step: Callable[..., None], teacher: nn.Module, student: nn.Module, trained: set[int], batch_size: int, ways: int = 1
) -> int:  # fmt: skip
    """The most bytes that `step` holds at once, run on tensors without values; of gradients one of `ways` shares."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    names = {name for name, p in student.named_parameters() if id(p) in trained}
    models = [copy.deepcopy(teacher), copy.deepcopy(student)]
    family = family_of(student)
    shape = family.sample_shape(student)
    with FakeTensorMode():
        for model, learns in zip(models, (set(), names), strict=True):
            _without_values(model, learns)
        if ways > 1:
            _keep_shares(models[1], ways)
        x = torch.empty(batch_size, *shape)
        t = torch.zeros(batch_size, dtype=torch.int64)
        cond = family.example_condition(models[1], batch_size)
        with LiveBytes() as tracked:
            step(models[0], models[1], x, t, cond)
        return tracked.peak


def _fit_peak(
    teacher: nn.Module, student: nn.Module, config: DistillConfig, batch_size: int, precision: str
) -> int:
    """The most bytes that the readout fits of one turn hold: their normal equations, and a batch's taps."""
    pupils = pupils_of(family_of(student), student, teacher, config)
    turns = in_turns({pupil.path: pupil.operator for pupil in pupils if pupil.entry.init == "donor"})
    if not config.fit_readout or not turns:
        return 0
    largest = max(turns, key=lambda turn: sum(map(ReadoutFit.num_bytes, turn.values())))
    places = {pupil.path: pupil.site.path for pupil in pupils if pupil.path in largest}

    def step(teacher: nn.Module, student: nn.Module, x: Tensor, t: Tensor, cond: Any) -> None:
        fits = {
            path: ReadoutFit(cast(Any, student.get_submodule(place)), x.device)
            for path, place in places.items()
        }
        with torch.no_grad(), _autocast(precision):
            taps = family_of(teacher).taps(teacher, x, t, cond, list(places))
        for path, fit in fits.items():
            tap = taps[path]
            fit.add(Tap(tap.input.float(), tap.output.float(), None, tap.cond))
        for fit in fits.values():
            damped = torch.empty_like(fit.normal)
            torch.empty_like(damped)  # its factors

    return _peak(step, _frozen(teacher, precision), student, set(), batch_size)


def _frozen(teacher: nn.Module, precision: str) -> nn.Module:
    """The teacher as both stages call it: under bf16 with a copy of its linear weights."""
    return frozen_copy(teacher, Compute(torch.device("cpu"), precision))


def _without_values(model: nn.Module, learns: set[str]) -> None:
    """Give a model on the meta device tensors that say they are on the CPU, where autocast and kernels are real."""
    for prefix, module in model.named_modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                full = f"{prefix}.{name}" if prefix else name
                fake = torch.empty(p.shape, dtype=p.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=full in learns)
        for name, b in list(module._buffers.items()):
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def _keep_shares(model: nn.Module, ways: int) -> None:
    """Have a model keep one of `ways` shares of each gradient as soon as it is there, like one that is cut."""
    kept: list[Tensor] = []

    def keep(parameter: Tensor) -> None:
        assert parameter.grad is not None
        kept.append(parameter.grad.new_empty(-(-parameter.grad.numel() // ways)))
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(keep)


@contextlib.contextmanager
def _autocast(precision: str) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        yield


# ---- accounting


def as_it_learns(student: nn.Module) -> nn.Module:
    """The student as stage 1 has it: branches of a group are apart where an operator among them learns on its own."""
    if not edited_groups(student):
        return student
    student = copy.deepcopy(student)
    open_groups(family_of(student), student, {site.layer for site, _ in edited_sites(student).values()})
    return student


def learning_sites(student: nn.Module) -> list[Site]:
    """What learns in stage 1, of a student as it learns: new operators, and groups of blocks."""
    found: list[tuple[Site, Any]] = [*edited_sites(student).values(), *edited_groups(student).values()]
    return [
        site for site, entry in found
        if entry.train and any(p.requires_grad for p in site.donor.parameters())
    ]  # fmt: skip


def new_parameters(student: nn.Module) -> list[nn.Parameter]:
    """The parameters that stage 1 trains, of a student as it learns."""
    found = [p for site in learning_sites(student) for p in site.donor.parameters() if p.requires_grad]
    return list({id(p): p for p in found}.values())


def _trained(student: nn.Module, config: Optimization) -> list[nn.Parameter]:
    """What stage 2 trains."""
    what = config.train if isinstance(config, FinetuneConfig) else "all"
    found = trained_parameters(family_of(student), student, "operators" if lora_of(student) else what)
    found |= {name: p for name, p in student.named_parameters() if is_lora(name)}
    return list(found.values())


def _sample_bytes(model: nn.Module) -> int:
    """Of one held-out sample: x0, x_t and noise, and what it is conditioned on."""
    family = family_of(model)
    condition = family.example_condition(model, 1)
    parts = condition if isinstance(condition, tuple) else (condition,)
    return 3 * 4 * _numel(family.sample_shape(model)) + sum(part.nbytes for part in parts)


def _optimizer_bytes(model: nn.Module, parameters: list[nn.Parameter], config: Optimization) -> int:
    """AdamW keeps two moments of every parameter, Muon one of every matrix of a linear layer."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, StackedLinear))}
    return sum(
        p.numel() * p.element_size() * (1 if config.optimizer == "muon" and id(p) in linear else 2)
        for p in parameters
    )


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _with_total(parts: dict[str, int]) -> dict[str, int]:
    return {**parts, "total": sum(parts.values())}
