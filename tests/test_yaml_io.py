"""YAML and JSON files: plain data round-trips; hostile, damaged and unreadable files end in one line."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grafting.errors import GraftError, RunError
from grafting.plain import FrozenDict, canonical_json, check_data
from grafting.yaml_io import MAX_BYTES, dump_json, dump_yaml, load_json, load_yaml, write_text

steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "no",
        "1e-4",
        "1_000",
        "1:30",
        "2024-01-01",
        "0x10",
        "007",
        "~",
        "null",
        ".nan",
        "<<",
        "=",
        "a.yaml",
        "- a",
        "True",
    ]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
)
data = st.recursive(
    scalars | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)

BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
)


@steady
@given(data, st.sampled_from([None, 0, 2]))
def test_round_trip(value: Any, flow_depth: int | None) -> None:
    assert canonical_json(
        load_yaml(dump_yaml({"v": value}, flow_depth=flow_depth), "data")["v"]
    ) == canonical_json(value)
    assert canonical_json(load_json(dump_json([value]), "data")) == canonical_json([value])


@steady
@given(
    st.dictionaries(st.text(max_size=5), text | st.integers(0, 9) | st.lists(text, max_size=2), max_size=3)
)
def test_other_readers_see_the_same(value: dict[str, Any]) -> None:
    """A file that this package writes means the same to a reader of YAML 1.1."""
    if any("\ud800" <= char <= "\udfff" for key in value for char in key):
        return
    assert yaml.safe_load(dump_yaml(value)) == value


@pytest.mark.parametrize(
    ("document", "value"),
    [
        ("a: 1e-4", {"a": 1e-4}),
        ("a: no", {"a": "no"}),
        ("a: 8-18:2,20-27", {"a": "8-18:2,20-27"}),
        ("a: 1:30", {"a": "1:30"}),
        ("a: 2024-01-01", {"a": "2024-01-01"}),
        ("a: 007", {"a": 7}),
        ("a: '1'", {"a": "1"}),
        ("a:", {"a": None}),
        ("a: [True, .5, ~]", {"a": [True, 0.5, None]}),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
        ("\ufeffa: 1", {"a": 1}),
    ],
)
def test_scalars_follow_the_core_schema(document: str, value: Any) -> None:
    assert load_yaml(document, "data") == value


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        ("- 1\n- !!python/object/apply:os.system [echo]", ["line 2", "tag", "python/object"]),
        ("a: !!str 1", ["line 1", "tag"]),
        ("a: ! 1", ["line 1", "tag"]),
        ("a: &x 1\nb: *x", ["line 1", "anchor &x", "write the value out"]),
        ("a: *x", ["alias *x"]),
        (BOMB, ["line 1", "anchor &a"]),
        ("[" * 40 + "]" * 40, ["deeper than 32"]),
        ("[" * 500_000, ["deeper than 32"]),
        ("{a: " * 200_000, ["deeper than 32"]),
        ("".join(f"{'  ' * i}a:\n" for i in range(900)), ["line 33", "deeper than 32"]),
        ("a: 1\nb: 2\na: 3", ["line 3", "'a' is given twice"]),
        ("1: a", ["line 1", "key 1 is not a string"]),
        ("? [a]\n: 1", ["key ['a'] is not a string"]),
        ("a: .nan", ["'.nan' is not a finite number"]),
        ("a: -.inf", ["not a finite number"]),
        ("a: 1e999", ["'1e999' is not a finite number"]),
        ("a: " + "9" * 6000, ["64 bits"]),
        ("a: 9223372036854775808", ["64 bits"]),
        ("a: 1\n---\nb: 2", ["line 2", "second document"]),
        ("a: [1, 2", ["not valid YAML"]),
        ("a: b: c", ["line 1", "not valid YAML"]),
        ("a: '\x00'", ["not valid YAML"]),
        ("\ud800", ["not valid YAML"]),
        ('a: "\\ud800"', ["recipe"]),
        ("", ["is empty"]),
        ("# nothing\n", ["is empty"]),
        ("x" * (MAX_BYTES + 1), ["longer than"]),
    ],
)
def test_hostile_yaml(document: str, parts: list[str]) -> None:
    start = time.process_time()
    with pytest.raises(RunError) as caught:
        load_yaml(document, "recipe", RunError)
    assert time.process_time() - start < 2
    message = str(caught.value)
    assert message.startswith("recipe")
    assert "\n" not in message
    assert len(message) < 300
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        ('{"a": 1,\n "a": 2}', ["'a' is given twice"]),
        ('{"a": NaN}', ["NaN is not a finite number"]),
        ('{"a": -Infinity}', ["-Infinity"]),
        ('{"a": 1e999}', ["data.a", "not a finite number"]),
        ('{"a": 1,\n b}', ["line 2", "not valid JSON"]),
        ("[" * 40 + "]" * 40, ["deeper than 32"]),
        ("[" * 500_000, ["deeper than 32"]),
        ("9" * 6000, ["64 bits"]),
        ("99999999999999999999", ["64 bits"]),
        (r'["\ud800"]', ["data[0]", "surrogate"]),
        (" ", ["is empty"]),
        (3, ["expected a path or text"]),
    ],
)
def test_hostile_json(document: Any, parts: list[str]) -> None:
    start = time.process_time()
    with pytest.raises(GraftError) as caught:
        load_json(document, "data")
    assert time.process_time() - start < 2
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@steady
@given(st.text(max_size=200) | st.text("[]{}:,-&*!|>'\"%#? \n\tab01", max_size=60))
def test_any_text_is_data_or_one_line(document: str) -> None:
    for load in (load_yaml, load_json):
        message = ""
        try:
            canonical_json(load(document, "data"))
        except GraftError as exc:
            message = str(exc)
        assert "\n" not in message


@steady
@given(st.binary(max_size=200))
def test_any_bytes_are_data_or_one_line(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    for name in ("any.yaml", "any.json"):
        (folder / name).write_bytes(raw)
        message = ""
        try:
            load_yaml(folder / name, "data")
        except GraftError as exc:
            message = str(exc)
        assert "\n" not in message


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "junk.yaml").write_bytes(b"a: 1\n\x80\xff")
    (tmp_path / "big.json").write_bytes(b" " * (MAX_BYTES + 1))
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, part in (
        (tmp_path / "none.yaml", "no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "junk.yaml", "line 2: not UTF-8"),
        (tmp_path / "big.json", "larger than"),
        (tmp_path / "pipe.yaml", "not a regular file"),
        (tmp_path / ("x" * 300 + ".yaml"), "can't be read"),
        (tmp_path / "junk.yaml" / "below.yaml", "can't be read"),
        (Path("a\0b.yaml"), "can't be read"),
        (Path("a\nb.yaml"), "no such file"),
    ):
        with pytest.raises(GraftError) as caught:
            load_yaml(path, "plan")
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_one_line_string_with_a_suffix_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    path.write_text("a: 1")
    assert load_yaml(str(path), "data") == {"a": 1}
    assert load_yaml("file: a.yml", "data") == {"file": "a.yml"}
    assert load_yaml("- a.yml", "data") == ["a.yml"]


def test_write_is_whole_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    write_text(path, "old", "plan")
    with pytest.raises(GraftError, match="can't be written"):
        write_text(path, "\ud800", "plan")
    with pytest.raises(GraftError, match="can't be written"):
        write_text(tmp_path / "none" / "a.yaml", "new", "plan")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.yaml"]


def test_frozen_dict() -> None:
    inner = [1, {"b": 2}]
    frozen = FrozenDict({"a": inner})
    inner.append(3)
    assert frozen == {"a": [1, {"b": 2}]}
    assert frozen["a"] == (1, FrozenDict({"b": 2}))
    assert {frozen: 1}[FrozenDict({"a": (1, {"b": 2})})] == 1
    assert FrozenDict({"a": 1}) != FrozenDict({"a": True})
    assert FrozenDict({"a": 1}) != {"a": object()}
    assert FrozenDict({}) != []
    frozen.to_dict()["a"].append(4)
    assert len(frozen["a"]) == 2
    with pytest.raises(AttributeError, match="can't be changed"):
        frozen.x = 1  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        frozen["a"] = 1  # type: ignore[index]
    assert json.loads(canonical_json(frozen.to_dict())) == {"a": [1, {"b": 2}]}


def test_check_data_stops_on_cycles_and_strangers() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    for value, part in (
        (cycle, "deeper than 32"),
        ({"a\n": [object()]}, "type object"),
        ({1: 2}, "not a string"),
    ):
        with pytest.raises(GraftError, match=part) as caught:
            check_data(value, "config")
        assert "\n" not in str(caught.value)
