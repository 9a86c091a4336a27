"""An immutable, hashable mapping of JSON-typed values: the configuration inside a plan entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from grafting.errors import GraftError
from grafting.yaml_io import canonical_json, check_data, show


class FrozenDict(Mapping[str, Any]):
    """Deep-frozen copy of a dict of JSON types.

    Equal to any mapping with the same canonical JSON text, so 1, 1.0 and True differ. Lists read as tuples and dicts as `FrozenDict`; `to_dict` gives a plain, fresh copy.
    """

    __slots__ = ("_items", "_text")
    _items: dict[str, Any]
    _text: str

    def __init__(self, items: Mapping[str, Any] | None = None) -> None:
        plain = check_data(items or {}, "config")
        object.__setattr__(self, "_text", canonical_json(plain))
        object.__setattr__(self, "_items", {key: _freeze(value) for key, value in plain.items()})

    @classmethod
    def of(cls, items: object, where: str, error: type[GraftError]) -> FrozenDict:
        """The frozen copy of what a user gave. Raises `error`, naming `where`, unless a dict of JSON types."""
        if isinstance(items, FrozenDict):
            return items
        if not isinstance(items, Mapping):
            raise error(f"{where}: expected a dict of settings, got {show(items)}")
        return cls(check_data(items, where, error))

    def to_dict(self) -> dict[str, Any]:
        """A plain copy: dicts and lists that the caller may change."""
        return {key: _thaw(value) for key, value in self._items.items()}

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a FrozenDict can't be changed; make a new one from its to_dict()")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a FrozenDict can't be changed; make a new one from its to_dict()")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        try:
            return bool(self._text == FrozenDict(other)._text)
        except GraftError:
            return False

    def __hash__(self) -> int:
        return hash(self._text)

    def __repr__(self) -> str:
        return f"FrozenDict({self.to_dict()!r})"

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (self.to_dict(),)


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return FrozenDict(value)
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def _thaw(value: Any) -> Any:
    if isinstance(value, FrozenDict):
        return value.to_dict()
    return [_thaw(item) for item in value] if isinstance(value, tuple) else value
