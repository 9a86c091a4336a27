"""Plans: round trips through dict, YAML and JSON; resolve; conflicts and malformed entries named."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grafting.errors import GraftError, PlanError
from grafting.plan import GraftPlan, Parallelize, Prune, Replace
from grafting.selectors import NAMED
from grafting.yaml_io import dump_json, dump_yaml, load_json, load_yaml

steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
DESIGN = """\
- replace: {target: mha, layers: interleaved-50, with: hyena_x}
- replace: {target: mlp, layers: [0, 2], with: {mlp: {ratio: 3}}, init: random, loss: l2}
- parallelize: {groups: pairs, merge: concat}
"""
LOCALITY = [0.1 * (layer % 7) for layer in range(12)]

names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
numbers = st.sets(st.integers(0, 11), min_size=1, max_size=6).map(sorted)
selectors = st.sampled_from([*NAMED, "0-4:2,7", "3"]) | numbers
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)
replaces = st.builds(
    Replace,
    names,
    selectors,
    names,
    st.dictionaries(names, values, max_size=3),
    init=st.sampled_from(["donor", "random"]),
    loss=st.sampled_from([None, "l1", "l2", "huber", "auto"]),
    scale_by_gate=st.booleans(),
    train=st.booleans(),
)
group_forms = (
    st.just("pairs")
    | st.fixed_dictionaries({"size": st.integers(2, 4)}, optional={"layers": selectors})
    | st.lists(st.sets(st.integers(0, 11), min_size=2, max_size=3).map(sorted), min_size=1, max_size=3)
)
entries = (
    replaces
    | st.builds(Parallelize, group_forms, st.sampled_from(["concat", "residual"]))
    | st.builds(Prune, selectors)
)
plans = st.lists(entries, min_size=1, max_size=5).map(GraftPlan)


@steady
@given(plans)
def test_round_trips(plan: GraftPlan) -> None:
    data = plan.to_dict()
    assert GraftPlan.from_dict(data) == plan
    assert GraftPlan.from_dict(data["entries"]) == plan
    for back in (load_yaml(dump_yaml(data, flow_depth=3), "plan"), load_json(dump_json(data), "plan")):
        again = GraftPlan.from_dict(back)
        assert again == plan
        assert hash(again) == hash(plan)
        assert again.digest() == plan.digest()
        assert again.to_dict() == data
    assert eval(repr(plan)) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert copy.deepcopy(plan) == plan
    assert len(str(plan).splitlines()) >= len(plan) + 1


@steady
@given(plans)
def test_resolve_is_idempotent_and_total(plan: GraftPlan) -> None:
    before = plan.digest()
    try:
        resolved = plan.resolve(12, LOCALITY)
    except PlanError:
        assert plan.digest() == before
        return
    assert resolved.is_resolved
    assert resolved.resolve(12) == resolved
    assert len(resolved) == len(plan)
    assert GraftPlan.from_dict(resolved.to_dict()) == resolved
    assert all(0 <= layer < 12 for _, layer in resolved.sites)
    in_groups = [layer for group, _ in resolved.groups for layer in group]
    assert len(in_groups) == len(set(in_groups))
    assert not set(resolved.pruned) & {*in_groups, *(layer for _, layer in resolved.sites)}


@steady
@given(plans, plans)
def test_diff_is_empty_exactly_for_equal_plans(one: GraftPlan, other: GraftPlan) -> None:
    assert one.diff(one) == []
    assert (one.diff(other) == []) == (one == other) == (one.digest() == other.digest())
    assert all("\n" not in line for line in one.diff(other))


@steady
@given(st.recursive(values, lambda inner: st.lists(inner, max_size=3), max_leaves=6))
def test_any_data_is_a_plan_or_a_plan_error(value: Any) -> None:
    for data in (
        value,
        [{"replace": value}],
        [{"parallelize": {"groups": value}}],
        [{"prune": {"layers": value}}],
    ):
        message = ""
        try:
            GraftPlan.from_dict(data)
        except PlanError as exc:
            message = str(exc)
        assert "\n" not in message


def test_design_example(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(DESIGN)
    plan = GraftPlan.load(path)
    assert plan == GraftPlan(
        [
            Replace("mha", "interleaved-50", "hyena_x"),
            Replace("mlp", [2, 0], "mlp", {"ratio": 3}, "random", "l2"),
            Parallelize("pairs"),
        ]
    )
    resolved = plan.resolve(6)
    assert {key: entry.operator for key, entry in resolved.sites.items()} == {
        ("mha", 1): "hyena_x",
        ("mha", 3): "hyena_x",
        ("mha", 5): "hyena_x",
        ("mlp", 0): "mlp",
        ("mlp", 2): "mlp",
    }
    assert resolved.groups == (((0, 1), "concat"), ((2, 3), "concat"), ((4, 5), "concat"))
    assert [layer for _, layer in resolved.sites][:3] == [1, 3, 5]
    for name in ("saved.yaml", "saved.yml", "saved.json"):
        resolved.save(tmp_path / name)
        assert GraftPlan.load(str(tmp_path / name)) == resolved
    assert (tmp_path / "saved.yaml").read_text() == (
        "version: 1\n"
        "entries:\n"
        "- replace: {target: mha, layers: [1, 3, 5], with: hyena_x}\n"
        "- replace: {target: mlp, layers: [0, 2], with: {mlp: {ratio: 3}}, init: random, loss: l2}\n"
        "- parallelize: {groups: [[0, 1], [2, 3], [4, 5]]}\n"
    )


def test_text_forms() -> None:
    plan = GraftPlan(
        [Replace("mha", "8,10,12,20-27", "swa", {"window": 4}, train=False), Parallelize([[1, 0]])]
    )
    assert str(plan) == (
        "plan of 2 entries\n"
        '  1. replace mha in 8-12:2,20-27 with swa {"window":4}, train False\n'
        "  2. parallelize [0-1], merge concat"
    )
    assert repr(plan) == (
        "GraftPlan([Replace('mha', '8-12:2,20-27', 'swa', {'window': 4}, train=False), "
        "Parallelize([[0, 1]])])"
    )


def test_diff_names_what_changes() -> None:
    one = GraftPlan([Replace("mha", "all", "swa", {"window": 4}), Prune([3]), Prune([5])])
    other = GraftPlan([Replace("mha", "all", "hyena_x", init="random"), Prune([3]), Parallelize("pairs")])
    assert one.diff(other) == [
        '~ entry 1: replace mha in all with swa {"window":4}: operator swa -> hyena_x, '
        'config {"window":4} -> {}, '
        "init donor -> random",
        "- entry 3: prune layers 5",
        "+ entry 3: parallelize pairs, merge concat",
    ]
    swapped = GraftPlan([one[1], one[0], one[2]])
    assert one.diff(swapped) == ["the same entries in another order"]


def test_entries_are_immutable_and_alias_nothing() -> None:
    config, layers = {"taps": [1, 2]}, [1, 3]
    entry = Replace("mha", layers, "mine", config)
    config["taps"].append(3)
    layers.append(5)
    assert entry == Replace("mha", [1, 3], "mine", {"taps": [1, 2]})
    entry.to_dict()["replace"]["with"]["mine"]["taps"].append(9)
    assert entry.config["taps"] == (1, 2)
    with pytest.raises(AttributeError):
        entry.init = "random"  # type: ignore[misc]
    assert len({entry, Replace("mha", (3, 1), "mine", {"taps": (1, 2)})}) == 1
    assert Replace("mha", "all", "mine", {"a": 1}) != Replace("mha", "all", "mine", {"a": True})


def test_groups_resolve() -> None:
    def groups(form: Any) -> list[tuple[int, ...]]:
        return [group for group, _ in GraftPlan([Parallelize(form)]).resolve(28).groups]

    assert groups("pairs") == [(i, i + 1) for i in range(0, 28, 2)]
    assert groups({"size": 3, "layers": "4-15"}) == [(4, 5, 6), (7, 8, 9), (10, 11, 12), (13, 14, 15)]
    assert groups({"size": 2, "layers": [0, 1, 6, 7]}) == [(0, 1), (6, 7)]
    assert groups({"size": 14}) == [tuple(range(14)), tuple(range(14, 28))]
    assert groups([[3, 2], (0, 1)]) == [(0, 1), (2, 3)]


MHA = {"target": "mha", "layers": [1, 3], "with": "swa"}


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ([], ["no entries"]),
        ({"version": 1, "entries": []}, ["no entries"]),
        ({"version": 2, "entries": [{"replace": MHA}]}, ["version 2", "reads 1"]),
        ({"version": True, "entries": [{"replace": MHA}]}, ["version True"]),
        ({"version": 1, "entrys": []}, ["'entrys'", "'entries'"]),
        ({"replace": MHA}, ["list of entries", "'- '"]),
        ("mha", ["list of entries", "'mha'"]),
        ([{"replce": MHA}], ["entry 1", "'replce'", "did you mean 'replace'?"]),
        ([{"replace": MHA, "prune": {"layers": [1]}}], ["entry 1", "one of the keys"]),
        ([{"replace": MHA}, "prune"], ["entry 2", "'prune'"]),
        ([{"replace": {**MHA, "inti": "random"}}], ["entry 1 (replace)", "'inti'", "did you mean 'init'?"]),
        ([{"replace": {**MHA, "operator": "swa"}}], ["'operator'", "write 'with'"]),
        (
            [{"replace": {"target": "mha", "layers": "8-18:2", "20-27": None, "with": "swa"}}],
            ["'20-27'", "quotes"],
        ),
        ([{"replace": {"target": "mha", "with": "swa"}}], ["'layers' is missing"]),
        ([{"replace": {**MHA, "with": {"swa": {}, "mlp": {}}}}], ["one operator", "2 keys"]),
        ([{"replace": {**MHA, "with": {"swa": 4}}}], ["config of swa", "4"]),
        ([{"replace": {**MHA, "with": {"swa": {"w": float("nan")}}}}], ["config of swa.w", "finite"]),
        ([{"replace": {**MHA, "with": {"swa": {"w": {1: 2}}}}}], ["config of swa.w", "not a string"]),
        ([{"replace": {**MHA, "with": "hyena x"}}], ["operator", "'hyena x'", "not a name"]),
        ([{"replace": {**MHA, "target": "attn!"}}], ["target", "'attn!'"]),
        (
            [{"replace": {**MHA, "init": "doner"}}],
            ["init", "'doner'", "donor | random", "did you mean 'donor'?"],
        ),
        ([{"replace": {**MHA, "loss": "l3"}}], ["loss", "'l3'", "l1 | l2 | huber | auto"]),
        ([{"replace": {**MHA, "train": "no"}}], ["train", "'no'", "true or false"]),
        ([{"replace": {**MHA, "layers": "odd"}}], ["entry 1 (replace): layers", "'odd'", "interleaved-50"]),
        ([{"prune": {"layers": []}}], ["entry 1 (prune)", "no layer"]),
        ([{"prune": [1]}], ["entry 1 (prune)", "expected a mapping"]),
        ([{"parallelize": {"groups": "triples"}}], ["'triples'", "'pairs'"]),
        ([{"parallelize": {"groups": [[1]]}}], ["group 1 has one layer, 1"]),
        ([{"parallelize": {"groups": [1, 2]}}], ["group 1 is 1"]),
        ([{"parallelize": {"groups": {"size": 1}}}], ["size 1", "2 to"]),
        ([{"parallelize": {"groups": {"size": 2, "layer": "all"}}}], ["'layer'", "did you mean 'layers'?"]),
        ([{"parallelize": {"groups": "pairs", "merge": "sum"}}], ["merge", "'sum'", "concat | residual"]),
    ],
)
def test_malformed_plans(data: Any, parts: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        GraftPlan.from_dict(data)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("plan", "parts"),
    [
        (
            [Replace("mha", "all", "swa"), Prune([0]), Replace("mha", "3", "mha")],
            ["layer 3: mha", "entry 1", "entry 3", "take layer 3 out"],
        ),
        ([Replace("mha", "0-28", "swa")], ["entry 1 (replace)", "layers of mha", "layer 28", "28 layers"]),
        ([Replace("mha", "top-local-50", "swa")], ["entry 1", "graft locality"]),
        (
            [Replace("mha", [1], "swa"), Prune([1, 2])],
            ["layer 1: pruned by entry 2", "replaced (mha) by entry 1"],
        ),
        ([Parallelize("pairs"), Prune([5])], ["layer 5: pruned by entry 2", "parallelized by entry 1"]),
        ([Prune([5]), Prune("4-6")], ["layer 5: pruned by entry 1 and by entry 2"]),
        ([Prune("all")], ["entry 1 (prune)", "no block of 28"]),
        ([Parallelize([[0, 1], [1, 2]])], ["layer 1: in two groups", "entry 1"]),
        ([Parallelize([[0, 1]]), Parallelize([[1, 2]], "residual")], ["layer 1: in two groups", "entry 2"]),
        ([Parallelize([[0, 2]])], ["entry 1 (parallelize)", "[0, 2]", "not consecutive", "layer 1"]),
        ([Parallelize([[27, 28]])], ["[27, 28]", "layer 28", "28 layers"]),
        ([Parallelize({"size": 3})], ["28 layers can't be split into groups of 3", "name 27"]),
        ([Parallelize({"size": 2, "layers": [0, 1, 2, 5]})], ["[2, 5]", "not consecutive"]),
    ],
)
def test_conflicts(plan: list[Any], parts: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        GraftPlan(plan).resolve(28)
    for part in parts:
        assert part in str(caught.value)


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    (tmp_path / "tag.yaml").write_text("- replace: !!python/name:os.system {}\n")
    (tmp_path / "empty.yaml").write_text("entries: []\n")
    (tmp_path / "bad.yaml").write_text("- prune: {layers: [1]}\n- prune: {layers: [-1]}\n")
    for name, part in (
        ("tag.yaml", "line 1: tag"),
        ("empty.yaml", "no entries"),
        ("bad.yaml", "bad.yaml: entry 2 (prune): layers: layer -1"),
        ("none.json", "no such file"),
        ("plan.txt", ".yaml, .yml, .json"),
    ):
        with pytest.raises(PlanError) as caught:
            GraftPlan.load(tmp_path / name)
        assert part in str(caught.value)
        assert name in str(caught.value)
    with pytest.raises(PlanError, match="can't be written"):
        GraftPlan([Prune([1])]).save(tmp_path / "none" / "plan.yaml")


def test_plans_are_made_of_entries(tmp_path: Path) -> None:
    for data, part in (
        (Prune([1]), r"GraftPlan\(\["),
        ([{"prune": 1}], r"entry 1 \(prune\)"),
        ([{"cut": 1}], "entry 1: unknown key"),
        ("a.yaml", "load"),
        ([], "no en"),
    ):
        with pytest.raises(PlanError, match=part):
            GraftPlan(data)  # type: ignore[arg-type]
    with pytest.raises(GraftError, match="resolve"):
        _ = GraftPlan([Prune("all")]).pruned
    empty = GraftPlan.empty()
    empty.save(tmp_path / "empty.json")
    assert GraftPlan.load(tmp_path / "empty.json", allow_empty=True) == empty == empty.resolve(12)
    assert len(empty) == 0
    assert repr(empty) == "GraftPlan.empty()"
