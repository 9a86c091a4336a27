"""The published checkpoints: `.pt` files in the published DiT's layout, also grafted ones, and back.

A published grafted file stores no plan: it is read off the keys and shapes inside `blocks.<i>.attn` and
`blocks.<i>.mlp`. The number of heads and a window size are in no shape; they are known or must be given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grafting import operators
from grafting.errors import CheckpointError, GraftError
from grafting.formats import weights
from grafting.formats.dit_states import block_numbers, infer_config
from grafting.models.dit import DiT, DiTConfig
from grafting.plan import GraftPlan, Replace
from grafting.surgery import GraftRecord, edited_groups, graft, record_of, set_record

_SEAMS = {"attn": "mha", "mlp": "mlp"}
_DONOR = {"attn": ("qkv", "proj"), "mlp": ("fc1", "fc2")}
_SEAM = re.compile(r"blocks\.(\d{1,4})\.(attn|mlp)\.(.+)")
_IN_SEAM = re.compile(r"blocks\.\d+\.((?:attn|mlp)\..+)")


@dataclass(frozen=True)
class _Reading:
    """How to recognise an operator: its parameter names, and its configuration from the shapes of some of them."""

    operator: str
    names: frozenset[str]
    config: Any  # Callable[[shapes by name, width, window], dict]
    read_from: tuple[str, ...] = ()


def _filters(name: str) -> Any:
    return lambda s, width, window: {"kernel_size": s[name][-1]}


def _mamba2(s: Mapping[str, list[int]], width: int, window: int) -> dict[str, Any]:
    inner, heads = s["norm.weight"][0], s["dt_bias"][0]
    return {
        "d_state": (s["conv1d.weight"][0] - inner) // 2,
        "expand": inner // width,
        "head_dim": inner // max(1, heads),
        "kernel_size": s["conv1d.weight"][-1],
    }


def _with_bias(*stems: str) -> frozenset[str]:
    return frozenset(f"{stem}.{kind}" for stem in stems for kind in ("weight", "bias"))


_READINGS = {
    "mha": (
        _Reading("mha", _with_bias("qkv", "proj"), lambda s, width, window: {}),
        _Reading(
            "hyena_se",
            _with_bias("in_proj", "short_filter", "inner_filter", "out_proj"),
            _filters("short_filter.weight"),
            ("short_filter.weight",),
        ),
        _Reading(
            "hyena_x", _with_bias("in_proj", "short_filter", "out_proj"), _filters("short_filter.weight"),
            ("short_filter.weight",),
        ),
        _Reading(
            "hyena_y", _with_bias("in_proj", "inner_filter", "out_proj"), _filters("inner_filter.weight"),
            ("inner_filter.weight",),
        ),
        _Reading("swa", _with_bias("Wqkv", "out_proj"), lambda s, width, window: {"window": window}),
        _Reading(
            "mamba2",
            frozenset({"dt_bias", "A_log", "D", "norm.weight", "in_proj.weight", "out_proj.weight"})
            | _with_bias("conv1d"),
            _mamba2,
            ("norm.weight", "dt_bias", "conv1d.weight"),
        ),
    ),
    "mlp": (
        _Reading(
            "mlp",
            _with_bias("fc1", "fc2"),
            lambda s, width, window: {"ratio": _ratio(s["fc1.weight"][0], width)},
            ("fc1.weight",),
        ),
        _Reading(
            "mlp_hyena_x",
            _with_bias("in_proj", "short_filter", "out_proj"),
            lambda s, width, window: {
                "ratio": _ratio(s["out_proj.weight"][1], width), "kernel_size": s["short_filter.weight"][-1],
            },
            ("out_proj.weight", "short_filter.weight"),
        ),
    ),
}  # fmt: skip


def _ratio(hidden: int, width: int) -> float:
    return hidden // width if hidden % width == 0 else hidden / width


def read_state(path: str | Path) -> weights.Tensors:
    """The state dict in a published `.pt` (key `ema`, else `model`, else the file itself)."""
    path = Path(path)
    content: Any = (
        weights.read_safetensors(path) if path.suffix == ".safetensors" else weights.read_pickled(path)
    )
    for key in ("ema", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"{str(path)!r} holds no state dict: expected the keys 'ema' or 'model', or bare tensors"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{str(path)!r}: entry {str(name)[:60]!r} is not a tensor; expected a state dict"
            )
    return {name: tensor.detach() for name, tensor in content.items()}


def infer_plan(
    state: Mapping[str, Tensor], config: DiTConfig, *, window: int = 4, where: str = "checkpoint"
) -> GraftPlan:
    """The plan that a published grafted state dict was made with, off its keys and shapes. May be empty.

    Raises CheckpointError that names the block and the tensor.
    """
    found: dict[tuple[str, str, str], list[int]] = {}
    settings_of: dict[tuple[str, str, str], dict[str, Any]] = {}
    expected: dict[tuple[str, str, str], dict[str, list[int]]] = {}
    inside: dict[tuple[int, str], dict[str, list[int]]] = {}  # (block, seam) -> name -> shape
    for name, tensor in state.items():
        if matched := _SEAM.fullmatch(name):
            inside.setdefault((int(matched[1]), matched[2]), {})[matched[3]] = list(tensor.shape)
    for layer in block_numbers(state):
        for seam, target in _SEAMS.items():
            prefix = f"blocks.{layer}.{seam}."
            shapes = inside.get((layer, seam), {})
            reading = next((r for r in _READINGS[target] if r.names == frozenset(shapes)), None)
            if reading is None:
                raise CheckpointError(f"{where}: {prefix[:-1]}: {_nearest(target, shapes)}")
            settings = _settings(reading, shapes, config, window, f"{where}: {prefix[:-1]}")
            key = (target, reading.operator, repr(sorted(settings.items())))
            if key not in expected:
                expected[key] = _shapes_of(reading, settings, config, shapes, f"{where}: {prefix[:-1]}")
            for name, shape in expected[key].items():
                if shapes[name] != shape:
                    raise CheckpointError(
                        f"{where}: tensor '{prefix}{name}' has shape {shapes[name]}, '{reading.operator}' needs "
                        f"{shape}{_read_off(reading, shapes)}"
                    )
            plain = reading.operator == target and (target == "mha" or settings["ratio"] == config.mlp_ratio)
            if not plain:
                found.setdefault(key, []).append(layer)
                settings_of[key] = settings
    entries = [
        Replace(
            target, layers, operator, _stated(operator, settings_of[target, operator, text]), init="random"
        )
        for (target, operator, text), layers in found.items()
    ]
    return GraftPlan(entries) if entries else GraftPlan.empty()


def _settings(
    reading: _Reading, shapes: Mapping[str, list[int]], config: DiTConfig, window: int, where: str
) -> dict[str, Any]:
    """The configuration that the shapes of one seam tell."""
    for name, shape in shapes.items():
        ndim = 1 if name.endswith("bias") or "." not in name or name == "norm.weight" else 2
        ndim = 3 if name.endswith(("filter.weight", "conv1d.weight")) else ndim
        if len(shape) != ndim or 0 in shape:
            raise CheckpointError(f"{where}.{name}: a tensor of shape {shape}, expected {ndim} dimensions")
    try:
        return operators.config_of(reading.operator, reading.config(shapes, config.hidden_size, window))
    except GraftError as error:
        raise CheckpointError(
            f"{where}: shapes that fit no '{reading.operator}'{_read_off(reading, shapes)}: {error}"
        ) from None


def _stated(operator: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a plan must state: those that are not the operator's default."""
    defaults = operators.get(operator).defaults
    return {key: value for key, value in settings.items() if key not in defaults or value != defaults[key]}


def _shapes_of(
    reading: _Reading, settings: Mapping[str, Any], config: DiTConfig, shapes: Mapping[str, list[int]], where: str
) -> dict[str, list[int]]:  # fmt: skip
    """The shapes of an operator's own tensors."""
    try:
        with torch.device("meta"):
            operator = operators.build(
                reading.operator, dim=config.hidden_size, num_heads=config.num_heads,
                num_tokens=config.num_tokens, **settings,
            )  # fmt: skip
    except GraftError as error:
        raise CheckpointError(
            f"{where}: shapes that fit no '{reading.operator}'{_read_off(reading, shapes)}: {error}"
        ) from None
    return {name: list(tensor.shape) for name, tensor in operator.state_dict().items()}


def _read_off(reading: _Reading, shapes: Mapping[str, list[int]]) -> str:
    """What the configuration was read from: it may be that which is wrong."""
    sources = ", ".join(f"{name} {shapes[name]}" for name in reading.read_from)
    return f" (its configuration was read off {sources})" if sources else ""


def _nearest(target: str, shapes: Mapping[str, list[int]]) -> str:
    """What is wrong with the keys of one seam, measured against the operator that shares most of them."""
    best = max(_READINGS[target], key=lambda r: len(r.names & set(shapes)) - len(r.names ^ set(shapes)))
    missing, extra = sorted(best.names - set(shapes)), sorted(set(shapes) - best.names)
    parts = ([f"missing {missing[0]!r}"] if missing else []) + ([f"unexpected {extra[0]!r}"] if extra else [])
    return f"keys of no known operator (nearest is '{best.operator}': {', '.join(parts)})"


def _donor_ratio(state: Mapping[str, Tensor], config: DiTConfig) -> float:
    """The published DiT has MLP ratio 4; a plain model of another ratio has one ratio throughout."""
    ratios = {width / config.hidden_size for width in _mlp_widths(state, config)}
    return ratios.pop() if len(ratios) == 1 and 4.0 not in ratios and not _grafted(state) else 4.0


def _mlp_widths(state: Mapping[str, Tensor], config: DiTConfig) -> set[int]:
    """Hidden widths of the two-layer MLPs of a state dict."""
    names = (f"blocks.{i}.mlp.fc1.weight" for i in range(config.depth))
    return {state[name].shape[0] for name in names if name in state and state[name].ndim == 2}


def _grafted(state: Mapping[str, Tensor]) -> bool:
    return any(".attn." in name and ".attn.qkv." not in name and ".attn.proj." not in name for name in state)


def load_published(path: str | Path, *, num_heads: int | None = None) -> DiT:
    """An unedited DiT from a published file. A grafted one is refused and pointed to `graft import`."""
    where = str(path)
    state = read_state(path)
    config = infer_config(state, num_heads=num_heads, where=where)
    donors = tuple(f"{seam}.{part}." for seam, parts in _DONOR.items() for part in parts)
    inside = [
        name for name in state if (match := _IN_SEAM.fullmatch(name)) and not match[1].startswith(donors)
    ]
    foreign = inside[:1]
    if foreign:
        raise CheckpointError(
            f"{where}: holds operators that a DiT does not have (such as {foreign[0]!r}): "
            "it is a grafted checkpoint; read it with `graft import`"
        )
    if len(widths := _mlp_widths(state, config)) > 1:
        raise CheckpointError(
            f"{where}: its MLPs are {' and '.join(map(str, sorted(widths)))} wide, a DiT's are all alike: it is a "
            "grafted checkpoint; read it with `graft import`"
        )
    with torch.device("meta"):  # nothing is allocated for a model that its tensors do not fit
        weights.check_fit(DiT(config).state_dict(), state, where)
    model = DiT(config)
    weights.load_strictly(model, _as_float(state), where)
    return model


def import_published(
    path: str | Path, *, num_heads: int | None = None, window: int | None = None
) -> nn.Module:
    """A published grafted checkpoint as an edited model whose plan was read off the file; it has no base.

    window: of the sliding-window operators, 4 if None, as published; it is in no shape. Raises CheckpointError,
    also for a window where no operator has one.
    """
    where = str(path)
    state = read_state(path)
    config = infer_config(state, num_heads=num_heads, where=where)
    config = DiTConfig(**{**config.to_dict(), "mlp_ratio": _donor_ratio(state, config)})
    plan = infer_plan(state, config, window=4 if window is None else window, where=where)
    if window is not None and not any(isinstance(e, Replace) and e.operator == "swa" for e in plan):
        raise CheckpointError(
            f"{where}: window={window}: the file has no 'swa' operator; leave the window out"
        )
    with torch.device("meta"):  # every tensor comes from the file, so nothing is drawn, hashed or copied here
        skeleton = DiT(config)
    model: nn.Module = graft(skeleton, plan) if len(plan) else skeleton
    weights.check_fit(
        model.state_dict(), state, where
    )  # nothing is allocated for what the file does not hold
    model.to_empty(device="cpu")
    weights.load_strictly(model, _as_float(state), where)
    model.eval()
    architecture = {"family": "dit", **config.to_dict()}
    set_record(model, GraftRecord(plan=plan, seed=0, source=None, architecture=architecture, base_digests={}))
    return model


def export_published(model: nn.Module, path: str | Path) -> None:
    """Write a DiT, edited or not, as a `.pt` with the published keys; `model` and `ema` hold its state dict.

    `args` is a dict where theirs is an `argparse.Namespace`, so that torch's own loader of weights takes the file;
    `opt` is empty: there is no training to go on with. Raises CheckpointError for what `import_published` could not
    read: blocks side by side, and operators of other packages.
    """
    if not isinstance(model, DiT):
        raise CheckpointError(f"only a DiT has a published layout, not {type(model).__name__}")
    if edited_groups(model):
        raise CheckpointError(
            "a model with blocks side by side has no published layout; keep its graft folder (--format graft)"
        )
    import io

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    record = record_of(model)
    for (target, _), entry in record.plan.sites.items() if record else ():
        if entry.operator not in (known := [reading.operator for reading in _READINGS[target]]):
            raise CheckpointError(
                f"the operator {entry.operator!r} has no published layout (those in the place of {target!r} that do: "
                f"{', '.join(known)}), so nothing could read the file; write a graft (--format graft, save_graft)"
            )
    content = {
        "model": state, "ema": state, "opt": {}, "args": {"plan": record.plan.digest() if record else None},
        "train_steps": 0,
    }  # fmt: skip
    buffer = io.BytesIO()
    torch.save(content, buffer)
    weights.write_bytes(Path(path), buffer.getvalue())


def _as_float(state: Mapping[str, Tensor]) -> weights.Tensors:
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
