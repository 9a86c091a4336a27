"""The entries of a plan: `Replace`, `Parallelize`, `Prune`. Immutable, validated when made, hashable.

Each knows its plan-file form (`to_dict`, `from_body`) and how its selectors become numbers (`resolved`).
Layer numbers are 0-based and always mean the teacher's blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias

from grafting.errors import PlanError
from grafting.plain import FrozenDict, canonical_json, show
from grafting.selectors import MAX_LAYERS, Locality, Selector, closest, format_layers, normalize, resolve

INITS = ("donor", "random")
LOSSES = (None, "l1", "l2", "huber", "auto")
GROUP_LOSSES = (None, "l1", "l2", "huber")
MERGES = ("concat", "residual")
_SHOWN = ("groups", "merge")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_DOTTED = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}(?:\.[A-Za-z_][A-Za-z0-9_]{0,99}){0,8}")


@dataclass(frozen=True, repr=False)
class Replace:
    """Put `operator` in the place of the donor operator of kind `target` in each of `layers`.

    target: kind of site, "mha" or "mlp", or one that a family registers.
    layers: a selector (`grafting.selectors`).
    operator: a registered name; its existence and its `config` are checked at surgery.
    config: settings of the operator, JSON types only; copied and frozen.
    init: "donor" copies what the donor's weights can give, "random" draws new ones.
    loss: of stage 1: l1, l2 or huber; None for the default of the target, "auto" to choose from activations.
    scale_by_gate: multiply both sides of that loss by the block's gate.
    train: False keeps the operator's initial weights in both stages.
    Raises PlanError for any value outside of these.
    """

    key: ClassVar[str] = "replace"

    target: str
    layers: Any
    operator: str
    config: Any = field(default_factory=FrozenDict)
    init: str = "donor"
    loss: str | None = None
    scale_by_gate: bool = False
    train: bool = True

    def __post_init__(self) -> None:
        _name(self.target, "target", _NAME, "a kind of site such as 'mha' or 'mlp'")
        _name(self.operator, "operator", _DOTTED, "the name of an operator such as 'hyena_x'")
        object.__setattr__(self, "layers", normalize(self.layers, where="layers"))
        config = {} if self.config is None else self.config
        object.__setattr__(self, "config", FrozenDict.of(config, f"config of {self.operator}", PlanError))
        _choice(self.init, "init", INITS)
        _choice(self.loss, "loss", LOSSES)
        for flag in ("scale_by_gate", "train"):
            if not isinstance(getattr(self, flag), bool):
                raise PlanError(f"{flag}: {show(getattr(self, flag))} is not a boolean; use true or false")

    def to_dict(self) -> dict[str, Any]:
        """Plan-file form of this entry, defaults left out."""
        body: dict[str, Any] = {"target": self.target, "layers": _plain(self.layers)}
        body["with"] = {self.operator: self.config.to_dict()} if self.config else self.operator
        for name, default in (("init", "donor"), ("loss", None), ("scale_by_gate", False), ("train", True)):
            if getattr(self, name) != default:
                body[name] = getattr(self, name)
        return {self.key: body}

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Replace:
        """The entry of a plan file: the mapping under the entry's key."""
        check_keys(
            body,
            ("target", "layers", "with"),
            ("init", "loss", "scale_by_gate", "train"),
            {"operator": "with", "config": "with: {name: {...}}"},
        )
        body = dict(body)
        given = body.pop("with")
        if isinstance(given, Mapping):
            if len(given) != 1:
                raise PlanError(f"with: expected one operator as {{name: {{...}}}}, got {len(given)} keys")
            ((operator, config),) = given.items()
            body["config"] = {} if config is None else config
        else:
            operator = given
        return cls(operator=operator, **body)

    def resolved(self, num_layers: int, locality: Locality | None = None) -> Replace:
        """The same entry with selectors replaced by the numbers they name. Raises PlanError."""
        return replace(
            self, layers=resolve(self.layers, num_layers, where=f"layers of {self.target}", locality=locality)
        )

    def __str__(self) -> str:
        config = f" {canonical_json(self.config.to_dict())}" if self.config else ""
        rest = [f"{name} {value}" for name, value in list(self.to_dict()[self.key].items())[3:]]
        operator = ", ".join([self.operator + config, *rest])
        return f"replace {self.target} in {_words(self.layers)} with {operator}"

    def __repr__(self) -> str:
        shown = [repr(self.target), repr(_plain(self.layers)), repr(self.operator)]
        shown += [repr(self.config.to_dict())] if self.config else []
        shown += [f"{name}={value!r}" for name, value in list(self.to_dict()[self.key].items())[3:]]
        return f"Replace({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Parallelize:
    """Run groups of consecutive blocks side by side on the same input and merge their outputs into one.

    groups: "pairs", {"size": n, "layers": selector} (layers: "all" if left out), or lists of layer numbers.
    merge: "concat" (the outputs, concatenated, through one linear projection to the width) or "residual" (one
    projection of the branches' residual updates, added to the input).
    init: of the merge: "donor" averages the outputs (concat) or adds up the updates (residual), "random" draws.
    loss: of stage 1: l1, l2 or huber; None for the default of the target `block_group`.
    train: False keeps the groups' initial weights in both stages.
    """

    key: ClassVar[str] = "parallelize"

    groups: Any
    merge: str = "concat"
    init: str = "donor"
    loss: str | None = None
    train: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", _groups(self.groups))
        _choice(self.merge, "merge", MERGES)
        _choice(self.init, "init", INITS)
        _choice(self.loss, "loss", GROUP_LOSSES)
        if not isinstance(self.train, bool):
            raise PlanError(f"train: {show(self.train)} is not a boolean; use true or false")

    def to_dict(self) -> dict[str, Any]:
        """Plan-file form of this entry, defaults left out."""
        groups = self.groups
        if isinstance(groups, FrozenDict):
            groups = groups.to_dict()
        elif not isinstance(groups, str):
            groups = [list(group) for group in groups]
        defaults = (("merge", "concat"), ("init", "donor"), ("loss", None), ("train", True))
        rest = {name: getattr(self, name) for name, default in defaults if getattr(self, name) != default}
        return {self.key: {"groups": groups} | rest}

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Parallelize:
        """The entry of a plan file: the mapping under the entry's key."""
        check_keys(body, ("groups",), ("merge", "init", "loss", "train"))
        return cls(**body)

    def resolved(self, num_layers: int, locality: Locality | None = None) -> Parallelize:
        """The same entry with selectors replaced by the numbers they name. Raises PlanError."""
        groups = self.groups
        if isinstance(groups, (str, FrozenDict)):
            size, layers = (2, "all") if isinstance(groups, str) else (groups["size"], groups["layers"])
            layers = resolve(layers, num_layers, where="layers of groups", locality=locality)
            if len(layers) % size:
                raise PlanError(
                    f"groups: {len(layers)} layers can't be split into groups of {size}; "
                    f"name {len(layers) - len(layers) % size} layers, or list the groups"
                )
            groups = tuple(tuple(layers[i : i + size]) for i in range(0, len(layers), size))
        for group in groups:
            resolve(group, num_layers, where=f"group {list(group)}")
            if group[-1] - group[0] != len(group) - 1:
                missing = next(layer for layer in range(group[0], group[-1]) if layer not in group)
                raise PlanError(
                    f"group {show(list(group))}: layers are not consecutive (layer {missing} lies between); "
                    "group neighbouring layers"
                )
        return replace(self, groups=groups)

    def __str__(self) -> str:
        groups = self.groups
        if isinstance(groups, FrozenDict):
            shown = f"groups of {groups['size']} in {_words(groups['layers'])}"
        else:
            shown = (
                groups
                if isinstance(groups, str)
                else ", ".join(f"[{format_layers(group)}]" for group in groups)
            )
        rest = [f"{name} {value}" for name, value in self.to_dict()[self.key].items() if name not in _SHOWN]
        return ", ".join([f"parallelize {shown}", f"merge {self.merge}", *rest])

    def __repr__(self) -> str:
        body = self.to_dict()[self.key]
        shown = [repr(body.pop("groups")), *(f"{name}={value!r}" for name, value in body.items())]
        return f"Parallelize({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Prune:
    """Drop whole blocks: the control for any other way to make a model smaller."""

    key: ClassVar[str] = "prune"

    layers: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", normalize(self.layers, where="layers"))

    def to_dict(self) -> dict[str, Any]:
        """Plan-file form of this entry."""
        return {self.key: {"layers": _plain(self.layers)}}

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Prune:
        """The entry of a plan file: the mapping under the entry's key."""
        check_keys(body, ("layers",))
        return cls(**body)

    def resolved(self, num_layers: int, locality: Locality | None = None) -> Prune:
        """The same entry with selectors replaced by the numbers they name. Raises PlanError."""
        return replace(
            self, layers=resolve(self.layers, num_layers, where="layers to prune", locality=locality)
        )

    def __str__(self) -> str:
        return f"prune {_words(self.layers)}"

    def __repr__(self) -> str:
        return f"Prune({_plain(self.layers)!r})"


Entry: TypeAlias = Replace | Parallelize | Prune
ENTRY_TYPES: dict[str, type[Replace] | type[Parallelize] | type[Prune]] = {
    kind.key: kind for kind in (Replace, Parallelize, Prune)
}


def check_keys(
    body: object,
    required: Sequence[str],
    optional: Sequence[str] = (),
    hints: Mapping[str, str] | None = None,
) -> None:
    """Raise PlanError unless `body` is a mapping with all `required` keys and else only `optional` ones."""
    known = (*required, *optional)
    if not isinstance(body, Mapping):
        raise PlanError(f"expected a mapping with the keys {', '.join(known)}, got {show(body)}")
    for key in body:
        if key in known:
            continue
        if isinstance(key, str) and key in (hints or {}):
            remedy = f"; write '{(hints or {})[key]}'"
        elif isinstance(key, str) and key[:1].isdigit():
            remedy = "; put quotes around a selector that holds a comma"
        else:
            remedy = closest(key, known)
        raise PlanError(f"unknown key {show(key)}{remedy or '; remove it'} (keys: {', '.join(known)})")
    for key in required:
        if key not in body:
            raise PlanError(f"key {key!r} is missing; give {', '.join(required)}")


def _choice(value: object, name: str, options: Sequence[str | None]) -> None:
    words = [option for option in options if option is not None]
    if value is None and None in options:
        return
    if not isinstance(value, str) or value not in words:
        raise PlanError(f"{name}: {show(value)} is not known; use {' | '.join(words)}{closest(value, words)}")


def _name(value: object, name: str, pattern: re.Pattern[str], expected: str) -> None:
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise PlanError(
            f"{name}: {show(value)} is not a name; expected {expected} (letters, digits, underscores)"
        )


def _groups(groups: object) -> str | FrozenDict | tuple[tuple[int, ...], ...]:
    forms = "'pairs', {size: n, layers: selector}, or lists of layer numbers such as [[0, 1], [2, 3]]"
    if isinstance(groups, str):
        if groups.strip() != "pairs":
            raise PlanError(f"groups: {show(groups)} is not known; use {forms}")
        return "pairs"
    if isinstance(groups, Mapping):
        try:
            check_keys(groups, ("size",), ("layers",))
        except PlanError as exc:
            raise PlanError(f"groups: {exc}") from None
        size = groups["size"]
        if type(size) is not int or not 2 <= size <= MAX_LAYERS:
            raise PlanError(f"groups: size {show(size)}; a group has 2 to {MAX_LAYERS} layers")
        layers = normalize(groups.get("layers", "all"), where="groups: layers")
        return FrozenDict({"size": size, "layers": _plain(layers)})
    if not isinstance(groups, (list, tuple)) or not groups or len(groups) > MAX_LAYERS:
        raise PlanError(f"groups: {show(groups)} is not known; use {forms}")
    made = []
    for number, group in enumerate(groups, 1):
        if not isinstance(group, (list, tuple)):
            raise PlanError(
                f"groups: group {number} is {show(group)}, not a list of layer numbers; use {forms}"
            )
        layers = normalize(group, where=f"groups: group {number}")
        if isinstance(layers, str) or len(layers) < 2:
            raise PlanError(f"groups: group {number} has one layer, {layers[0]}; a group has 2 or more")
        made.append(layers)
    return tuple(sorted(made))


def _plain(layers: Selector) -> str | list[int]:
    return layers if isinstance(layers, str) else list(layers)


def _words(layers: Selector | Sequence[int]) -> str:
    return layers if isinstance(layers, str) else f"layers {format_layers(layers)}"
