"""Selectors: what each names, its normal form, and that no input escapes a tuple or a PlanError."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from grafting.errors import PlanError
from grafting.selectors import (
    LOCAL,
    MAX_LAYERS,
    NAMED,
    check_syntax,
    format_layers,
    normalize,
    resolve,
)

steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
PIXART = (8, 10, 12, 14, 16, 18, 20, 21, 22, 23, 24, 25, 26, 27)


@pytest.mark.parametrize(
    ("selector", "num_layers", "layers"),
    [
        ("all", 3, (0, 1, 2)),
        ("interleaved-50", 28, tuple(range(1, 28, 2))),
        ("interleaved-50", 5, (1, 3)),
        ("interleaved-75", 28, tuple(i for i in range(28) if i % 4 != 0)),
        ("first-50", 28, tuple(range(14))),
        ("deep-50", 28, tuple(range(14, 28))),
        ("deep-50", 5, (3, 4)),
        (" all ", 2, (0, 1)),
        ([3, 1], 4, (1, 3)),
        ((2,), 4, (2,)),
        ({0, 2}, 4, (0, 2)),
        (range(0, 12, 3), 12, (0, 3, 6, 9)),
        (range(3, -1, -1), 12, (0, 1, 2, 3)),
        (np.int64(3), 4, (3,)),
        (list(np.arange(3)), 4, (0, 1, 2)),
        (0, 1, (0,)),
        ("8-18:2,20-27", 28, PIXART),
        (" 20 - 27 , 8 - 18 : 2 ", 28, PIXART),
        ("3", 4, (3,)),
        ("0-2", 3, (0, 1, 2)),
        ("0-11:999999999999", 12, (0,)),
    ],
)
def test_resolve(selector: Any, num_layers: int, layers: tuple[int, ...]) -> None:
    resolved = resolve(selector, num_layers)
    assert resolved == layers
    assert all(type(layer) is int for layer in resolved)


@pytest.mark.parametrize(
    ("selector", "num_layers", "parts"),
    [
        ("interleaved50", 28, ["'interleaved50'", "did you mean 'interleaved-50'?"]),
        ("half", 28, ["'half'", "8-18:2,20-27"]),
        ([28], 28, ["layer 28", "28 layers", "0 to 27"]),
        ("20-28", 28, ["layer 28", "28 layers"]),
        ("0-999999999999", 28, ["layer 999999999999", "28 layers"]),
        ("0-99999999999999999999", 28, ["not a selector"]),
        (10**30, 28, ["layer 10000000000", "28 layers"]),
        (range(10**30), 28, ["layer 99999", "28 layers"]),
        (range(-3, 3), 28, ["layer -3 is negative"]),
        ([-1], 28, ["layer -1 is negative"]),
        ("-1", 28, ["'-1'", "not a selector"]),
        ([1, 1], 28, ["layer 1 is named twice"]),
        ("1-3,2", 28, ["layer 2 is named twice"]),
        ("5-3", 28, ["'5-3'", "backwards", "'3-5'"]),
        ("0-6:0", 28, ["step 0"]),
        ("1,,2", 28, ["'' in '1,,2'"]),
        ("", 28, ["names no layer"]),
        ([], 28, ["names no layer"]),
        (range(0), 28, ["names no layer"]),
        ("interleaved-50", 1, ["'interleaved-50'", "1 layer;", "by number"]),
        (True, 28, ["True", "not a selector"]),
        ([False], 28, ["False", "not a layer number"]),
        ([1.0], 28, ["1.0", "not a layer number"]),
        (["1"], 28, ["'1'", "not a layer number"]),
        (None, 28, ["None", "not a selector"]),
        ({"a": 1}, 28, ["not a selector"]),
        (list(range(MAX_LAYERS + 1)), 28, [f"{MAX_LAYERS + 1} numbers", "28 layers"]),
        ("1," * 10**6, 28, ["2000000 characters"]),
        ("all", 0, ["number of layers"]),
        ("all", 10**12, ["number of layers"]),
        ("all", "28", ["number of layers"]),
        ("٣", 28, ["not a selector"]),
    ],
)
def test_errors_say_what_and_where(selector: Any, num_layers: Any, parts: list[str]) -> None:
    start = time.process_time()
    with pytest.raises(PlanError) as caught:
        resolve(selector, num_layers, where="entry 1")
    message = str(caught.value)
    assert time.process_time() - start < 1
    assert message.startswith("entry 1: ")
    assert "\n" not in message
    assert len(message) < 400
    for part in parts:
        assert part in message


def test_local_selectors_split_the_layers(tmp_path: Any) -> None:
    locality = [0.2, 0.9, 0.5, 0.5, 0.9, 0.1]
    assert resolve("top-local-50", 6, locality=locality) == (
        1,
        2,
        4,
    )  # of the tie 2, 3 the lower number ranks first
    assert resolve("low-local-50", 6, locality=locality) == (0, 3, 5)
    assert resolve("top-local-50", 4, locality=[0.5] * 4) == (0, 1)
    assert resolve("low-local-50", 4, locality=np.full(4, 0.5)) == (2, 3)
    file = tmp_path / "locality.json"
    file.write_text(json.dumps({"k": 8, "locality": locality}))
    for given_file in (file, str(file)):
        assert resolve("top-local-50", 6, locality=given_file) == (1, 2, 4)


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize(
    ("locality", "parts"),
    [
        (None, ["needs measured locality", "graft locality"]),
        ([0.1, 0.2], ["2 values", "4 layers", "graft locality"]),
        ([0.1, float("nan"), 0.2, 0.3], ["layer 1", "nan", "finite"]),
        ([0.1, True, 0.2, 0.3], ["layer 1", "True"]),
        ({"k": 8}, ["no key 'locality'"]),
        (0.5, ["float", "4 layers"]),
        ("missing.json", ["missing.json", "no such file"]),
        ("nul\0", ["can't be read"]),
    ],
)
def test_locality_errors(name: str, locality: Any, parts: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        resolve(name, 4, locality=locality)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("8-18:2,20-27", "8-18:2,20-27"),
        ("20-27,8,10,12-18:2", "8-18:2,20-27"),
        ("1,3,5", "1-5:2"),
        ("1,3", "1,3"),
        ("4-4", "4"),
        ("0-1", "0-1"),
        ("0-28:3", "0-27:3"),
        (" deep-50", "deep-50"),
    ],
)
def test_normal_form(text: str, normal: str) -> None:
    assert normalize(text) == normal
    assert normalize(normal) == normal


@steady
@given(st.sets(st.integers(0, MAX_LAYERS - 1), min_size=1, max_size=60))
def test_format_round_trips(layers: set[int]) -> None:
    text = format_layers(sorted(layers))
    assert resolve(text, MAX_LAYERS) == tuple(sorted(layers))
    assert normalize(text) == text


selector_text = st.one_of(
    st.text(max_size=30),
    st.text("0123456789-:, ", max_size=24),
    st.sampled_from(NAMED).map(lambda name: name[:-1]),
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), selector_text, st.sampled_from(NAMED)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@steady
@given(
    anything,
    st.one_of(st.integers(-1, 40), st.none(), st.just(10**20)),
    st.one_of(st.none(), st.lists(st.floats())),
)
@example("0-999999999999", 28, None)
@example([float("inf")], 28, None)
def test_total(selector: Any, num_layers: Any, locality: Any) -> None:
    try:
        layers = resolve(selector, num_layers, locality=locality)
    except PlanError:
        return
    assert layers
    assert list(layers) == sorted(set(layers))
    assert 0 <= layers[0] <= layers[-1] < num_layers
    check_syntax(selector)  # what fits a model is well formed without one
    assert resolve(normalize(selector), num_layers, locality=locality) == layers
