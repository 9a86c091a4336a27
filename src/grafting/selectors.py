"""The one language in which plans name layers: `all`, `interleaved-50`, `[1, 3]`, `"8-18:2,20-27"`, ...

Layer numbers are 0-based and always mean the teacher's blocks. Every function here is total: any input gives
an answer or a `PlanError`, at once.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from grafting.errors import PlanError
from grafting.plain import show
from grafting.yaml_io import load_json

MAX_LAYERS = 4096
"""No model has more layers; larger numbers are refused before anything is allocated."""

NAMED = (
    "all",
    "interleaved-50",
    "interleaved-75",
    "first-50",
    "deep-50",
    "top-local-50",
    "low-local-50",
)
LOCAL = ("top-local-50", "low-local-50")

Selector: TypeAlias = str | tuple[int, ...]
"""Normal form: a name, a canonical range string, or sorted layer numbers."""

Locality: TypeAlias = Sequence[float] | str | os.PathLike[str]
"""Locality per layer, or the JSON file of `graft locality` that holds it under the key `locality`."""

_RANGE = re.compile(r"\s*([0-9]{1,12})\s*(?:-\s*([0-9]{1,12})\s*(?::\s*([0-9]{1,12})\s*)?)?")
_FORMS = f"{', '.join(NAMED)}, a list of numbers, or ranges like '8-18:2,20-27'"


def resolve(
    selector: object, num_layers: int, *, where: str = "layers", locality: Locality | None = None
) -> tuple[int, ...]:
    """Sorted, unique layer numbers that `selector` names in a model of `num_layers` layers.

    `interleaved-50` are the odd layers, `interleaved-75` those with i % 4 != 0, `first-50` and `deep-50` the
    first and last floor(L/2). `top-local-50` takes the floor(L/2) layers of highest `locality`,
    `low-local-50` those of lowest; layers are ranked once, ties by layer number, so the two never overlap.
    Ranges include their end.
    Raises PlanError, beginning with `where`, for anything malformed, duplicate, out of range or empty.
    """
    if not _is_int(num_layers) or not 1 <= num_layers <= MAX_LAYERS:
        raise PlanError(f"{where}: the number of layers is 1 to {MAX_LAYERS}, got {show(num_layers)}")
    num_layers = int(num_layers)
    if isinstance(selector, str) and selector.strip() in NAMED:
        layers = _named(selector.strip(), num_layers, where, locality)
        if not layers:
            raise PlanError(
                f"{where}: {selector.strip()!r} matches none of the model's {_count(num_layers)}; "
                "name layers by number"
            )
        return layers
    return _numbers(selector, num_layers, where, f"the model has {_count(num_layers)}")


def normalize(selector: object, *, where: str = "layers") -> Selector:
    """Normal form without a model: names as they are, numbers sorted, range strings in canonical spelling."""
    if isinstance(selector, str) and selector.strip() in NAMED:
        return selector.strip()
    layers = _numbers(selector, MAX_LAYERS, where, f"layer numbers end at {MAX_LAYERS - 1}")
    return format_layers(layers) if isinstance(selector, str) else layers


def check_syntax(selector: object, *, where: str = "layers") -> None:
    """Raise PlanError if `selector` is malformed whatever the model."""
    normalize(selector, where=where)


def needs_locality(selector: object) -> bool:
    """Whether `resolve` needs measured locality for this selector."""
    return isinstance(selector, str) and selector.strip() in LOCAL


def format_layers(layers: Sequence[int]) -> str:
    """Canonical range string of layer numbers, e.g. (8, 10, 12, 20, 21) -> '8-12:2,20-21'; '' for none."""
    ordered, parts, first = sorted(set(layers)), [], 0
    while first < len(ordered):
        last = first + 1 if first + 1 < len(ordered) else first
        step = ordered[last] - ordered[first]
        while last + 1 < len(ordered) and ordered[last + 1] - ordered[last] == step:
            last += 1
        if step > 1 and last + 1 < len(ordered) and ordered[last + 1] - ordered[last] == 1:
            last -= 1  # that layer begins the consecutive run that follows
        if step > 1 and last - first < 2:
            last = first
        stride = f":{step}" if step > 1 else ""
        parts.append(f"{ordered[first]}" if last == first else f"{ordered[first]}-{ordered[last]}{stride}")
        first = last + 1
    return ",".join(parts)


def closest(word: object, options: Sequence[str]) -> str:
    """'; did you mean X?' if one of the options is close to the word, else ''."""
    if not isinstance(word, str) or len(word) > 80:
        return ""
    close = difflib.get_close_matches(word.strip().lower(), options, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _named(name: str, num_layers: int, where: str, locality: Locality | None) -> tuple[int, ...]:
    half = num_layers // 2
    if name in LOCAL:
        values = _locality(name, num_layers, where, locality)
        ranked = sorted(range(num_layers), key=lambda layer: (-values[layer], layer))
        return tuple(sorted(ranked[:half] if name == "top-local-50" else ranked[num_layers - half :]))
    return {
        "all": tuple(range(num_layers)),
        "interleaved-50": tuple(range(1, num_layers, 2)),
        "interleaved-75": tuple(layer for layer in range(num_layers) if layer % 4),
        "first-50": tuple(range(half)),
        "deep-50": tuple(range(num_layers - half, num_layers)),
    }[name]


def _locality(name: str, num_layers: int, where: str, locality: Locality | None) -> list[float]:
    if locality is None:
        raise PlanError(
            f"{where}: {name!r} needs measured locality; run `graft locality` and give its JSON file"
        )
    values: Any = locality
    if isinstance(locality, (str, os.PathLike)):
        values = load_json(Path(locality), "locality file", PlanError)
    if isinstance(values, Mapping):
        if "locality" not in values:
            raise PlanError(
                f"{where}: the locality file has no key 'locality'; write it with `graft locality`"
            )
        values = values["locality"]
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, (list, tuple)) or len(values) != num_layers:
        got = f"{len(values)} values" if isinstance(values, (list, tuple)) else type(values).__name__
        raise PlanError(
            f"{where}: locality has {got}, expected one number for each of the model's {_count(num_layers)}; "
            "measure it on this model with `graft locality`"
        )
    for layer, value in enumerate(values):
        if value is None:
            raise PlanError(
                f"{where}: locality of layer {layer} was not measured (its attention was replaced before); "
                "run `graft locality` on the unedited model"
            )
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
            raise PlanError(f"{where}: locality of layer {layer} is {show(value)}, expected a finite number")
    return [float(value) for value in values]


def _numbers(selector: object, stop: int, where: str, bound: str) -> tuple[int, ...]:
    """Layer numbers of an explicit selector, all below `stop`; `bound` says why in errors."""
    if getattr(selector, "ndim", 0) == 1:  # an array or a tensor
        selector = selector.tolist()  # type: ignore[attr-defined]
    if isinstance(selector, str):
        ranges = _parse_ranges(selector, where)
    elif _is_int(selector):
        ranges = [_single(selector, where)]
    elif isinstance(selector, range):
        ordered = selector if selector.step > 0 else selector[::-1]
        ranges = [_single(ordered[0], where), ordered[1:]] if ordered else []
    elif isinstance(selector, (list, tuple, set, frozenset)):
        if len(selector) > MAX_LAYERS:
            raise PlanError(f"{where}: {len(selector)} numbers, but {bound}")
        ranges = [_single(item, where) for item in selector]
    else:
        raise PlanError(f"{where}: {show(selector)} is not a selector; use {_FORMS}")
    if not ranges:
        raise PlanError(f"{where}: names no layer; use {_FORMS}")
    found: set[int] = set()
    for part in filter(None, ranges):
        if part[-1] >= stop:
            raise PlanError(f"{where}: layer {show(part[-1])} does not exist: {bound}; use 0 to {stop - 1}")
        for layer in part:
            if layer in found:
                raise PlanError(f"{where}: layer {layer} is named twice; name it once")
            found.add(layer)
    return tuple(sorted(found))


def _parse_ranges(text: str, where: str) -> list[range]:
    if len(text) > 8 * MAX_LAYERS:
        raise PlanError(f"{where}: a selector of {len(text)} characters; use {_FORMS}")
    if not text.strip():
        raise PlanError(f"{where}: names no layer; use {_FORMS}")
    ranges = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            shown = show(text) if part.strip() == text.strip() else f"{show(part.strip())} in {show(text)}"
            raise PlanError(f"{where}: {shown} is not a selector; use {_FORMS}{closest(text, NAMED)}")
        first, last, step = (None if group is None else int(group) for group in match.groups())
        assert first is not None  # the expression's first group always takes part
        last = first if last is None else last
        step = 1 if step is None else step
        if last < first:
            raise PlanError(f"{where}: range {show(part.strip())} runs backwards; write '{last}-{first}'")
        if step == 0:
            raise PlanError(f"{where}: range {show(part.strip())} has step 0; use 1 or more")
        ranges.append(range(first, last + 1, step))
    return ranges


def _single(value: Any, where: str) -> range:
    if not _is_int(value):
        raise PlanError(f"{where}: {show(value)} is not a layer number; use whole numbers from 0")
    if value < 0:
        raise PlanError(f"{where}: layer {show(value)} is negative; layers are numbered from 0")
    return range(int(value), int(value) + 1)


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _count(num_layers: int) -> str:
    return f"{num_layers} layer{'s' if num_layers > 1 else ''}"
