"""Plain data: None, bool, int, float, str, list, and dict with string keys; checked, copied, frozen."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from grafting.errors import GraftError

MAX_DEPTH = 32


def show(value: object, limit: int = 60) -> str:
    """One short line for an error message, whatever the value is."""
    try:
        text = repr(value[: limit + 1]) if isinstance(value, str) else reprlib.repr(value)
    except Exception:  # a repr that fails must not hide the error it is part of
        text = f"<{type(value).__name__}>"
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def check_data(value: object, where: str, error: type[GraftError] = GraftError) -> Any:
    """A plain copy of JSON-typed data: lists and dicts anew, tuples as lists.

    Raises `error`, naming the place, for any other type, a key that is not a string, a number that is not
    finite or does not fit 64 bits, text that is not Unicode, and more than 32 levels.
    """
    return _copy(value, where, error, 0)


def _copy(value: object, where: str, error: type[GraftError], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise error(f"{where}: nested deeper than {MAX_DEPTH} levels; flatten it")
    if value is None or isinstance(value, bool):
        return value
    if type(value) is int:
        if not -(1 << 63) <= value < 1 << 63:
            raise error(f"{where}: an integer beyond 64 bits; use a smaller number")
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise error(f"{where}: {value} is not a finite number; use a finite one, or leave the key out")
        return value
    if type(value) is str:
        if any("\ud800" <= char <= "\udfff" for char in value) if not value.isascii() else False:
            raise error(f"{where}: text {value[:20]!a} holds half a surrogate pair; write it as UTF-8")
        return value
    if isinstance(value, (list, tuple)):
        return [_copy(item, f"{where}[{i}]", error, depth + 1) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        copied = {}
        for key, item in value.items():
            if type(key) is not str:
                raise error(f"{where}: key {show(key)} is not a string; quote it")
            copied[_copy(key, where, error, depth)] = _copy(item, f"{where}.{_label(key)}", error, depth + 1)
        return copied
    raise error(
        f"{where}: {show(value)} has type {type(value).__name__}; "
        "use numbers, strings, booleans, lists and dicts"
    )


def _label(key: str) -> str:
    return key if key.isidentifier() and len(key) <= 60 else show(key)


def canonical_json(data: Any) -> str:
    """The one JSON text of this data: sorted keys, no spaces, ASCII. For hashes and comparisons."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


class FrozenDict(Mapping[str, Any]):
    """Deep-frozen copy of a dict of JSON types.

    Equal to any mapping with the same canonical JSON text, so 1, 1.0 and True differ. Lists read as tuples
    and dicts as `FrozenDict`; `to_dict` gives a plain, fresh copy.
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
        """The frozen copy of what a user gave. Raises `error`, naming `where`, unless plain data."""
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
