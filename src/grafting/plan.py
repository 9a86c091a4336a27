"""What to edit: a `GraftPlan` of `Replace`, `Parallelize` and `Prune` entries. Plain data, no model.

A plan file is YAML or JSON:

    version: 1
    entries:
    - replace: {target: mha, layers: interleaved-50, with: hyena_x}
    - replace: {target: mlp, layers: [0, 2], with: {mlp: {ratio: 3}}, init: random, loss: l2}
    - parallelize: {groups: pairs, merge: concat}
    - prune: {layers: [1, 3]}

A bare list of entries is read too. Keys at their default are left out when a plan is written.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from grafting.entries import ENTRY_TYPES, Entry, Parallelize, Prune, Replace, check_keys
from grafting.errors import PlanError
from grafting.plain import canonical_json, show
from grafting.selectors import Locality, closest
from grafting.yaml_io import SUFFIXES, dump_json, dump_yaml, load_yaml, show_path, write_text

__all__ = ["Entry", "GraftPlan", "Parallelize", "Prune", "Replace"]

VERSION = 1
VERSIONS_READ = (1,)
MAX_ENTRIES = 10_000


EntryLike: TypeAlias = "Entry | Mapping[str, Any]"  # an entry, or one in plan-file form


@dataclass(frozen=True, init=False, repr=False)
class GraftPlan:
    """An immutable sequence of entries; equal if the entries are, in the same order.

    Entries are `Replace`, `Parallelize` and `Prune`, or mappings in plan-file form ({"replace": {"target": ...}}).
    Raises PlanError when there is no entry, or something that is not an entry.
    """

    entries: tuple[Entry, ...]

    def __init__(self, entries: Iterable[EntryLike]) -> None:
        if isinstance(entries, (Replace, Parallelize, Prune)):
            raise PlanError(f"a plan is a list of entries, got one entry; write GraftPlan([{show(entries)}])")
        if isinstance(entries, Mapping):
            raise PlanError(
                f"a plan is a list of entries, got {show(entries)}; read it with GraftPlan.from_dict"
            )
        if isinstance(entries, (str, bytes, os.PathLike)) or not isinstance(entries, Iterable):
            raise PlanError(
                f"a plan is a list of entries, got {show(entries)}; read files with GraftPlan.load"
            )
        entries = tuple(itertools.islice(entries, MAX_ENTRIES + 1))
        if not entries:
            raise PlanError("the plan has no entries; give at least one replace, parallelize or prune")
        made = (
            entry if isinstance(entry, (Replace, Parallelize, Prune)) else _entry(entry, number)
            for number, entry in enumerate(entries, 1)
        )  # fmt: skip
        object.__setattr__(self, "entries", tuple(made))

    @classmethod
    def of(cls, plan: PlanLike) -> GraftPlan:
        """A plan in any form: itself, entries, plan-file data, or the path of a plan file. Raises PlanError."""
        if isinstance(plan, GraftPlan):
            return plan
        if isinstance(plan, Mapping):
            return cls.from_dict(plan)
        return cls.load(plan) if isinstance(plan, (str, os.PathLike)) else cls(plan)

    @classmethod
    def empty(cls) -> GraftPlan:
        """The plan that changes nothing. Only for imports of self-grafts, whose keys are the donor's own."""
        plan = cls.__new__(cls)
        object.__setattr__(plan, "entries", ())
        return plan

    @classmethod
    def from_dict(cls, data: object, *, allow_empty: bool = False) -> GraftPlan:
        """The plan of a list of entries in plan-file form, or of {"version": 1, "entries": [...]}.

        Raises PlanError that names the entry (counted from 1), the key and the remedy.
        `allow_empty` is for graft folders, which may hold an imported self-graft.
        """
        if isinstance(data, Mapping):
            data = _entries_of(data)
        if not isinstance(data, (list, tuple)):
            raise PlanError(
                f"a plan is a list of entries, or a mapping with version and entries; got {show(data)}"
            )
        if len(data) > MAX_ENTRIES:
            raise PlanError(f"a plan of {len(data)} entries; give at most {MAX_ENTRIES}")
        if allow_empty and not data:
            return cls.empty()
        return cls(data)

    def to_dict(self) -> dict[str, Any]:
        """{"version": 1, "entries": [...]} in plan-file form, keys at their default left out."""
        return {"version": VERSION, "entries": [entry.to_dict() for entry in self.entries]}

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, allow_empty: bool = False) -> GraftPlan:
        """The plan in a .yaml, .yml or .json file. Raises PlanError that names the file and the entry."""
        path = _checked_suffix(path)
        data = load_yaml(path, "plan", PlanError)
        try:
            return cls.from_dict(data, allow_empty=allow_empty)
        except PlanError as exc:
            raise PlanError(f"plan {show_path(path)}: {exc}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .yaml, .yml or .json file, whole or not at all. Raises PlanError where it can't be written.

        Selectors are written as they are; `resolve` first for a plan that belongs to one model.
        """
        path = _checked_suffix(path)
        data = self.to_dict()
        text = dump_json(data) if path.suffix.lower() == ".json" else dump_yaml(data, flow_depth=3)
        write_text(path, text, "plan", PlanError)

    def resolve(self, num_layers: int, locality: Locality | None = None) -> GraftPlan:
        """The same plan with selectors replaced by sorted layer numbers of a `num_layers`-block model.

        Idempotent. Raises PlanError for a selector that does not fit, two edits of one target in one layer, a
        layer in two groups, a group that is not consecutive, a pruned layer that is edited too, and a plan
        that prunes every block; it names the layer, both entries and the remedy.
        """
        resolved = []
        for number, entry in enumerate(self.entries, 1):
            try:
                resolved.append(entry.resolved(num_layers, locality))
            except PlanError as exc:
                raise PlanError(f"entry {number} ({entry.key}): {exc}") from None
        plan = GraftPlan.empty() if not resolved else GraftPlan(resolved)
        _check_conflicts(plan, num_layers)
        return plan

    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON of `to_dict`: the same for equal plans, and only those."""
        return hashlib.sha256(canonical_json(self.to_dict()).encode()).hexdigest()

    def diff(self, other: GraftPlan) -> list[str]:
        """What must change in this plan to get `other`, one line each; none exactly if they are equal."""
        if self == other:
            return []
        removed, added = list(enumerate(self.entries, 1)), list(enumerate(other.entries, 1))
        _drop_pairs(removed, added, lambda entry: entry)
        old, new = list(removed), list(added)
        pairs = _drop_pairs(removed, added, _place)
        lines = [f"~ entry {number}: {_changes(before, after)}" for number, before, after in pairs]
        lines += [f"- entry {number}: {entry}" for number, entry in removed]
        lines += [f"+ entry {number}: {entry}" for number, entry in added]
        return lines if old or new else ["the same entries in another order"]

    @property
    def sites(self) -> dict[tuple[str, int], Replace]:
        """Which `Replace` acts on each (target, layer). For a resolved plan; else PlanError."""
        return {
            (e.target, layer): e
            for e in self._resolved_entries()
            if isinstance(e, Replace)
            for layer in e.layers
        }

    @property
    def groups(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """(layers, merge) of every parallel group, by first layer. For a resolved plan; else PlanError."""
        found = [
            (g, e.merge) for e in self._resolved_entries() if isinstance(e, Parallelize) for g in e.groups
        ]
        return tuple(sorted(found))

    @property
    def group_entries(self) -> dict[tuple[int, ...], Parallelize]:
        """Which `Parallelize` makes each group of layers. For a resolved plan; else PlanError."""
        return {g: e for e in self._resolved_entries() if isinstance(e, Parallelize) for g in e.groups}

    @property
    def pruned(self) -> tuple[int, ...]:
        """Sorted numbers of the pruned layers. For a resolved plan; else PlanError."""
        return tuple(sorted(n for e in self._resolved_entries() if isinstance(e, Prune) for n in e.layers))

    @property
    def is_resolved(self) -> bool:
        """Whether every entry holds numbers only."""
        return all(
            isinstance(e.groups if isinstance(e, Parallelize) else e.layers, tuple) for e in self.entries
        )

    def _resolved_entries(self) -> tuple[Entry, ...]:
        if not self.is_resolved:
            raise PlanError("the plan still holds selectors; call resolve(num_layers) first")
        return self.entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Entry:
        return self.entries[index]

    def __str__(self) -> str:
        lines = [f"  {number}. {entry}" for number, entry in enumerate(self.entries, 1)]
        return "\n".join([f"plan of {len(self)} entr{'y' if len(self) == 1 else 'ies'}", *lines])

    def __repr__(self) -> str:
        return f"GraftPlan([{', '.join(map(repr, self.entries))}])" if self.entries else "GraftPlan.empty()"


PlanLike: TypeAlias = "GraftPlan | Iterable[EntryLike] | Mapping[str, Any] | str | os.PathLike[str]"


def _entries_of(data: Mapping[str, Any]) -> object:
    for key in ENTRY_TYPES:
        if key in data:
            raise PlanError(
                f"a plan is a list of entries, got one {key!r}; put '- ' before it, in Python [...] around it"
            )
    if "plan" in data and "entries" not in data:
        raise PlanError(
            "this looks like a recipe, whose plan stands under 'plan'; give a file of that list of entries alone"
        )
    check_keys(data, ("entries",), ("version",))
    version = data.get("version", VERSION)
    if type(version) is not int or version not in VERSIONS_READ:
        read = ", ".join(map(str, VERSIONS_READ))
        raise PlanError(f"plan version {show(version)} is not known; this package reads {read}: upgrade it")
    return data["entries"]


def _entry(item: object, number: int) -> Entry:
    kinds = ", ".join(ENTRY_TYPES)
    if not isinstance(item, Mapping) or len(item) != 1:
        raise PlanError(f"entry {number}: expected a mapping with one of the keys {kinds}; got {show(item)}")
    ((key, body),) = item.items()
    if not isinstance(key, str) or key not in ENTRY_TYPES:
        raise PlanError(
            f"entry {number}: unknown key {show(key)}{closest(key, list(ENTRY_TYPES))} (keys: {kinds})"
        )
    try:
        return ENTRY_TYPES[key].from_body(body)
    except PlanError as exc:
        raise PlanError(f"entry {number} ({key}): {exc}") from None


def _checked_suffix(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise PlanError(f"plan: expected the path of a file, got {show(path)}")
    if Path(path).suffix.lower() not in SUFFIXES:
        raise PlanError(f"plan {show_path(Path(path))}: a plan file ends in {', '.join(SUFFIXES)}; rename it")
    return Path(path)


def _check_conflicts(plan: GraftPlan, num_layers: int) -> None:
    """Raise PlanError for the first two entries of a resolved plan that can't both be done."""
    edited: dict[tuple[str, int], int] = {}
    grouped: dict[int, int] = {}
    pruned: dict[int, int] = {}
    for number, entry in enumerate(plan, 1):
        if isinstance(entry, Replace):
            for layer in entry.layers:
                first = edited.setdefault((entry.target, layer), number)
                if first != number:
                    raise PlanError(
                        f"layer {layer}: {entry.target} is replaced by entry {first} and by entry {number}; "
                        f"take layer {layer} out of one of them"
                    )
        elif isinstance(entry, Parallelize):
            for layer in (layer for group in entry.groups for layer in group):
                if layer in grouped:
                    raise PlanError(
                        f"layer {layer}: in two groups (entry {grouped[layer]} and entry {number}); "
                        "keep it in one of them"
                    )
                grouped[layer] = number
        else:
            for layer in entry.layers:
                if layer in pruned:
                    raise PlanError(
                        f"layer {layer}: pruned by entry {pruned[layer]} and by entry {number}; "
                        f"take layer {layer} out of one of them"
                    )
                pruned[layer] = number
    for layer, number in pruned.items():
        others = [(f"replaced ({target})", n) for (target, at), n in edited.items() if at == layer]
        others += [("parallelized", grouped[layer])] if layer in grouped else []
        for what, other in others:
            raise PlanError(
                f"layer {layer}: pruned by entry {number} and {what} by entry {other}; "
                f"take layer {layer} out of one of them"
            )
    if pruned and len(pruned) == num_layers:
        raise PlanError(
            f"entry {max(pruned.values())} (prune): no block of {num_layers} is left; keep one at least"
        )


def _place(entry: Entry) -> object:
    if isinstance(entry, Parallelize):
        return (entry.key, entry.groups)
    return (entry.key, getattr(entry, "target", None), entry.layers)


def _drop_pairs(left: list[Any], right: list[Any], key: Any) -> list[tuple[int, Entry, Entry]]:
    """Take entries of the same key out of both numbered lists; returns (number, left, right) of each."""
    pairs = []
    for item in list(left):
        match = next((other for other in right if key(other[1]) == key(item[1])), None)
        if match is not None:
            left.remove(item)
            right.remove(match)
            pairs.append((item[0], item[1], match[1]))
    return pairs


def _changes(before: Entry, after: Entry) -> str:
    names = [name for name in before.__dataclass_fields__ if getattr(before, name) != getattr(after, name)]
    shown = [f"{name} {_plain(before, name)} -> {_plain(after, name)}" for name in names]
    return f"{before}: {', '.join(shown)}"


def _plain(entry: Entry, name: str) -> str:
    value = getattr(entry, name)
    return canonical_json(value.to_dict()) if hasattr(value, "to_dict") else str(value)
