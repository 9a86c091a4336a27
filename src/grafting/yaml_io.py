"""Reading and writing of small YAML and JSON files: plain data in, plain data out, nothing executed.

What comes back is plain data (`grafting.plain`). Scalars follow the YAML 1.2 core schema, so that `1e-4` is a
number and `no` is a word. Tags, anchors, aliases, duplicate keys, NaN, infinities, files above 1 MB and
nesting above 32 levels are refused, each in one line with file and, where known, line.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from grafting.errors import GraftError
from grafting.plain import MAX_DEPTH, check_data, show

MAX_BYTES = 1 << 20
SUFFIXES = (".yaml", ".yml", ".json")

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def load_yaml(text_or_path: str | os.PathLike[str], what: str, error: type[GraftError] = GraftError) -> Any:
    """Data of a YAML document, or of a JSON file if the path ends in `.json`.

    A path object, and a one-line string that ends in .yaml, .yml or .json, is a file; any other string is the
    document itself. `what` says in errors what it is meant to be ("plan", "recipe"). Raises `error`.
    """
    if isinstance(text_or_path, os.PathLike) or _is_path(text_or_path):
        path = Path(text_or_path)
        where = f"{what} {show_path(path)}"
        parse = _parse_json if path.suffix.lower() == ".json" else _parse_yaml
        return parse(_read(path, where, error), where, error)
    return _parse_yaml(_limit(text_or_path, what, error), what, error)


def load_json(text_or_path: str | os.PathLike[str], what: str, error: type[GraftError] = GraftError) -> Any:
    """Data of a JSON document; which strings are paths and what is refused is as for `load_yaml`."""
    if isinstance(text_or_path, os.PathLike) or _is_path(text_or_path):
        where = f"{what} {show_path(Path(text_or_path))}"
        return _parse_json(_read(Path(text_or_path), where, error), where, error)
    return _parse_json(_limit(text_or_path, what, error), what, error)


def dump_yaml(data: Any, *, flow_depth: int | None = None) -> str:
    """YAML text that `load_yaml` reads back as the same data, keys in their order.

    Collections nested `flow_depth` levels or deeper are written in flow style, {a: 1}; None for none.
    """
    root = _Dumper(_NullStream(), sort_keys=False).represent_data(check_data(data, "data"))
    _set_flow(root, 0, flow_depth)
    return str(yaml.serialize(root, Dumper=_Dumper, width=110, allow_unicode=True))


def dump_json(data: Any) -> str:
    """Indented JSON text of checked data, with a final newline."""
    return json.dumps(check_data(data, "data"), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_text(
    path: str | os.PathLike[str], text: str, what: str, error: type[GraftError] = GraftError
) -> None:
    """Write a text file whole or not at all (temporary file, then rename). Raises `error` if it can't."""
    path = Path(path)
    temporary = None
    try:
        raw = text.encode("utf-8")
        temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")
        with open(temporary, "xb") as file:
            file.write(raw)
        os.replace(temporary, path)
    except (OSError, ValueError) as exc:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        reason = getattr(exc, "strerror", None) or exc
        raise error(
            f"{what} {show_path(path)}: can't be written ({reason}); choose a writable folder"
        ) from None


def _is_path(text: object) -> bool:
    return (
        isinstance(text, str)
        and text.endswith(SUFFIXES)
        and "\n" not in text
        and not text.startswith(("- ", "{", "["))
        and ": " not in text
    )


def show_path(path: Path) -> str:
    """The path as one line of text, whatever characters it holds."""
    text = str(path)
    return text if text.isprintable() and len(text) <= 300 else show(text, 300)


def _limit(text: str, where: str, error: type[GraftError]) -> str:
    if not isinstance(text, str):
        raise error(f"{where}: expected a path or text, got {type(text).__name__}")
    if len(text) > MAX_BYTES:
        raise error(f"{where}: longer than {MAX_BYTES} characters; this can't be a {where}")
    return text


def _read(path: Path, where: str, error: type[GraftError]) -> str:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise error(f"{where}: is a folder, expected a file; name the file in it")
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{where}: is not a regular file; save it to one first")
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise error(f"{where}: no such file; check the path") from None
    except PermissionError:
        raise error(f"{where}: permission denied; make the file readable") from None
    except GraftError:
        raise
    except (OSError, ValueError) as exc:
        raise error(
            f"{where}: can't be read ({getattr(exc, 'strerror', None) or exc}); check the path"
        ) from None
    if len(raw) > MAX_BYTES:
        raise error(f"{where}: larger than {MAX_BYTES} bytes; this file can't be what is asked for")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        raise error(f"{where}, line {line}: not UTF-8 text; is it the right file?") from None


def _parse_json(text: str, where: str, error: type[GraftError]) -> Any:
    if not text.strip():
        raise error(f"{where}: is empty")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise error(f"{where}: key {show(twice)} is given twice; keep one")
        return found

    def constant(name: str) -> NoReturn:
        raise error(f"{where}: {name} is not a finite number; use a finite one, or leave the key out")

    try:
        data = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except GraftError:
        raise
    except json.JSONDecodeError as exc:
        raise error(f"{where}, line {exc.lineno}: not valid JSON ({exc.msg}, column {exc.colno})") from None
    except RecursionError:
        raise error(f"{where}: nested deeper than {MAX_DEPTH} levels; flatten it") from None
    except ValueError:  # an integer of thousands of digits
        raise error(f"{where}: an integer beyond 64 bits; use a smaller number") from None
    return check_data(data, where, error)


def _parse_yaml(text: str, where: str, error: type[GraftError]) -> Any:
    events = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    try:
        return check_data(_Builder(events, where, error).document(), where, error)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(exc, "problem", None) or getattr(exc, "reason", None) or "unreadable"
        raise error(f"{where}{line}: not valid YAML ({problem})") from None
    except GraftError:
        raise
    except (UnicodeError, ValueError, OverflowError) as exc:
        raise error(f"{where}: not valid YAML ({type(exc).__name__})") from None


class _Builder:
    """Plain data from the parser's events; an event that is more is an error with its line."""

    def __init__(self, events: Iterator[Any], where: str, error: type[GraftError]) -> None:
        self.events, self.where, self.error = events, where, error

    def fail(self, event: Any, message: str) -> NoReturn:
        raise self.error(f"{self.where}, line {event.start_mark.line + 1}: {message}")

    def document(self) -> Any:
        next(self.events)  # start of the stream
        if isinstance(next(self.events), yaml.StreamEndEvent):
            raise self.error(f"{self.where}: is empty")
        data = self.node(next(self.events), 0)
        next(self.events)  # end of the document
        event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            self.fail(event, "a second document begins; keep one document a file")
        return data

    def node(self, event: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            self.fail(event, f"nested deeper than {MAX_DEPTH} levels; flatten it")
        if isinstance(event, yaml.AliasEvent):
            self.fail(event, f"alias *{str(event.anchor)[:40]} is not read; write the value out")
        if event.anchor is not None:
            self.fail(event, f"anchor &{event.anchor[:40]} is not read; write the value out where it is used")
        if event.tag is not None:
            self.fail(
                event, f"tag {show(event.tag)} is not read; remove it (nothing in this file is executed)"
            )
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(item := next(self.events), yaml.SequenceEndEvent):
                items.append(self.node(item, depth + 1))
            return items
        mapping: dict[str, Any] = {}
        while not isinstance(item := next(self.events), yaml.MappingEndEvent):
            key = self.node(item, depth + 1)
            if not isinstance(key, str):
                self.fail(item, f"key {show(key)} is not a string; quote it")
            if key in mapping:
                self.fail(item, f"key {show(key)} is given twice; keep one")
            mapping[key] = self.node(next(self.events), depth + 1)
        return mapping

    def scalar(self, event: Any) -> Any:
        text = event.value
        if not event.implicit[0]:  # quoted or block text
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text):
            if len(text) > 20 or not -(1 << 63) <= int(text) < 1 << 63:
                self.fail(event, "an integer beyond 64 bits; use a smaller number")
            return int(text)
        if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
            return float(text)
        if _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text):
            self.fail(event, f"{show(text)} is not a finite number; use a finite one, or leave the key out")
        return text


class _NullStream:
    def write(self, text: str) -> None:
        """The representer needs a stream but writes nothing."""


class _Dumper(yaml.SafeDumper):
    """Quotes every string that a reader of YAML 1.1 or 1.2 could take for something else; writes no alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = None if data.isprintable() else '"'  # escapes keep what line folding would change
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


for _tag, _pattern in (("int", _INT), ("float", _FLOAT), ("float", _NOT_FINITE)):
    _Dumper.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern.pattern})$"), list("-+.0123456789")
    )


def _set_flow(node: yaml.Node, depth: int, flow_depth: int | None) -> None:
    if isinstance(node, yaml.CollectionNode):
        node.flow_style = flow_depth is not None and depth >= flow_depth
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                _set_flow(part, depth + 1, flow_depth)
