"""The search: its choice against brute force and SciPy's solver, its damages against the models, its files."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_dit
from hypothesis import given
from hypothesis import strategies as st
from search_tools import CANDIDATES, searched
from several import together
from tiny_runs import STAGE, tiny_recipe
from typer.testing import CliRunner

from grafting import GraftPlan, Parallelize, Replace, graft, load_graft, load_model, save_graft, save_model
from grafting.cli import app
from grafting.console import Console
from grafting.data import load_dataset
from grafting.errors import GraftError, PlanError, RunError
from grafting.families import family_of
from grafting.recipes import load_recipe
from grafting.runs import RunFolder
from grafting.search import Choice, Option, best_choice, pareto_choices, search_plan
from grafting.search.choice import UNIT
from grafting.search.damage import Damage
from grafting.training.compute import Compute, make_compute
from grafting.training.config import FinetuneConfig
from grafting.training.loop import Batches
from grafting.training.objectives import noise_weight

SITES = st.lists(
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from([-0.02, 0.0, 0.01, 0.03, 0.05])), min_size=1, max_size=3),
    min_size=1, max_size=5,
)  # fmt: skip


def options_of(sites: list[list[tuple[float, float]]]) -> list[Option]:
    return [
        Option(f"b{place}", number, damage, saving)
        for place, here in enumerate(sites)
        for number, (damage, saving) in enumerate(here)
    ]


def every_choice(sites: list[list[tuple[float, float]]]) -> list[Choice]:
    options = options_of(sites)
    at = [[None, *(o for o in options if o.path == f"b{place}")] for place in range(len(sites))]
    return [Choice(tuple(o for o in taken if o is not None)) for taken in itertools.product(*at)]


@given(SITES, st.sampled_from([None, 1.0, 0.97, 0.93, 0.9]), st.integers(0, 5))
def test_the_best_choice_is_that_of_trying_all(
    sites: list[list[tuple[float, float]]], budget: float | None, at_least: int
) -> None:
    at_least = min(at_least, len(sites))
    allowed = [
        choice
        for choice in every_choice(sites)
        if len(choice.options) >= at_least and (budget is None or choice.cost <= budget + 1e-9)
    ]
    if not allowed:
        with pytest.raises(PlanError, match="can't be met"):
            best_choice(options_of(sites), budget=budget, at_least=at_least)
        return
    found = best_choice(options_of(sites), budget=budget, at_least=at_least)
    assert found.damage == pytest.approx(min(choice.damage for choice in allowed), abs=1e-12)
    assert len(found.options) >= at_least
    assert budget is None or found.cost <= budget + 1e-5


@given(SITES)
def test_no_choice_beats_a_pareto_choice_and_none_is_missing(sites: list[list[tuple[float, float]]]) -> None:
    found = pareto_choices(options_of(sites))
    for choice in every_choice(sites):
        assert any(p.damage <= choice.damage + 1e-12 and p.cost <= choice.cost + 1e-5 for p in found)
    damages = [p.damage for p in found]
    assert damages == sorted(damages)  # dearest first
    assert len(set(damages)) == len(damages)


def test_the_choice_at_real_size_is_that_of_scipys_solver() -> None:
    """28 blocks, two sites each, four candidates a site."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    draw = np.random.default_rng(0)
    options = [Option(f"b{s}", k, *draw.random(2) * [1, 1 / 60]) for s in range(56) for k in range(4)]

    def least(budget: float, at_least: int) -> float:
        at_path = np.kron(np.eye(56), np.ones((1, 4)))
        return milp(
            [o.damage for o in options], integrality=np.ones(224), bounds=Bounds(0, 1), options={"mip_rel_gap": 0},
            constraints=[
                LinearConstraint(at_path, -np.inf, 1),
                LinearConstraint(np.array([[o.saving for o in options]]), 1 - budget, np.inf),
                LinearConstraint(np.ones((1, 224)), at_least, np.inf),
            ],
        ).fun  # fmt: skip

    for budget, at_least in ((0.7, 0), (0.5, 40), (1.0, 56)):
        found = best_choice(options, budget=budget, at_least=at_least).damage
        slack = (
            2 * 56 * UNIT
        )  # savings are counted in whole units, and the budget is met to within one a site
        assert least(budget + slack, at_least) - 1e-9 <= found <= least(budget, at_least) + 1e-9


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"budget": 0.5}, "0.9000"), ({"at_least": 3}, "2 sites"), ({"budget": -1.0}, "above 0")],
)
def test_what_cannot_be_had_is_refused_with_what_can(arguments: dict[str, Any], said: str) -> None:
    options = [Option("a", 0, 0.1, 0.06), Option("b", 0, 0.2, 0.04)]
    with pytest.raises(PlanError, match=said):
        best_choice(options, **arguments)


def test_a_damage_that_is_no_number_is_refused() -> None:
    with pytest.raises(PlanError, match="no numbers"):
        pareto_choices([Option("a", 0, float("nan"), 0.1)])


def test_damage_is_the_weighted_difference_of_the_predictions(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    teacher, data = load_model(recipe["model"]).eval(), load_dataset(recipe["data"])
    student = graft(teacher, [Replace("mha", [1, 3], "hyena_x")], seed=3).eval()
    family, config = family_of(teacher), FinetuneConfig()
    paths = [site.path for site in family.sites(teacher) if site.kind == "mha" and site.layer in (1, 3)]
    operators = {path: student.get_submodule(path) for path in paths}
    measured = [
        Damage(teacher, data, config, make_compute(torch.device("cpu")), num_samples=20, at_once=size, seed=0)
        for size in (20, 7)
    ]  # fmt: skip
    batch = Batches(
        data, family, teacher, seed=0, purpose="search", label_dropout=config.label_dropout,
        device=torch.device("cpu"), spread=True,
    ).at(torch.arange(20))  # fmt: skip
    with torch.no_grad():
        outputs = [family.predict(model, batch.x_t, batch.t, batch.cond) for model in (teacher, student)]
    error = (outputs[0] - outputs[1]).square()
    weight = noise_weight(batch.t, config.output_snr_cap)[:, None, None, None]
    wanted = (weight * error[:, :1]).mean() + config.output_variance * error[:, 1:].mean()
    assert wanted > 0
    for damage in measured:
        assert damage.of(operators) == pytest.approx(wanted.item(), rel=1e-5)
        assert damage.of({}) == 0  # the operators are back in their places
    assert all(
        type(teacher.get_submodule(path)) is type(measured[0].model.get_submodule(path)) for path in paths
    )


def test_a_search_leaves_a_plan_a_graft_and_a_recipe_that_goes_on(tmp_path: Path) -> None:
    found = searched(tmp_path, at_least=5)
    chosen = found["chosen"]
    assert chosen["replaced"] == 5
    out = tmp_path / "search"
    assert json.loads((out / "search.json").read_text()) == found
    plan = GraftPlan.load(out / "plan.yaml")
    assert plan.to_dict()["entries"] == chosen["plan"]
    assert len(plan.sites) == 5

    # The best five by trying all, from the damages on file, as the sum says.
    damages: dict[str, list[float]] = {}
    for candidate in found["candidates"]:
        for site in candidate["sites"]:
            damages.setdefault(site["path"], []).append(site["damage"])
    assert chosen["damage"] == pytest.approx(sum(sorted(min(d) for d in damages.values())[:5]))

    # The graft has the distilled operators, and is what `together` was measured on.
    student = load_graft(out / "graft")
    recipe = load_recipe(str(out / "recipe.yaml"))
    teacher, data = load_model(recipe.model).eval(), load_dataset(recipe.data)
    damage = Damage(
        teacher,
        data,
        FinetuneConfig(**STAGE),
        make_compute(torch.device("cpu")),
        num_samples=16,
        at_once=4,
        seed=0,
    )
    sites = [s.path for s in family_of(student).sites(student) if (s.kind, s.layer) in plan.sites]
    together = damage.of({path: student.get_submodule(path) for path in sites})
    assert together == pytest.approx(chosen["together"], rel=1e-5)

    result = CliRunner().invoke(app, ["run", str(out / "recipe.yaml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert RunFolder.open(tmp_path / "run").result("finetune") is not None


def test_a_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = searched(tmp_path, budget=0.95)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("search/candidates/*/metrics.jsonl")}
    assert len(before) == 3
    assert searched(tmp_path, budget=0.95) == first  # nothing is distilled again, all figures are the same
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert first["chosen"]["cost"] <= 0.95 + 1e-5
    other = searched(tmp_path, at_least=8, by="params")  # another aim over the same candidates
    assert other["chosen"]["replaced"] == 8
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_savings_are_those_of_the_costs(tmp_path: Path) -> None:
    from grafting.surgery import explain

    found = searched(tmp_path, budget=0.97)
    teacher = load_model(tiny_recipe(tmp_path)["model"])
    said = explain(teacher, found["chosen"]["plan"])
    before, after = said.flops_per_image
    assert found["chosen"]["cost"] == pytest.approx(after / before)


def test_latency_can_be_the_budget(tmp_path: Path) -> None:
    found = searched(tmp_path, GraftPlan([Replace("mha", "all", "hyena_x")]), at_least=1, by="latency")
    savings = {site["saving"] for site in found["candidates"][0]["sites"]}
    assert len(savings) == 1  # one layer is timed for all


@pytest.mark.parametrize(
    ("arguments", "candidates", "said"),
    [
        ({}, CANDIDATES, "needs an aim"),
        ({"budget": 0.1}, CANDIDATES, "can't be met"),
        ({"budget": 1.0}, CANDIDATES, "met by the model as it is"),
        ({"at_least": 9}, CANDIDATES, "8 sites"),
        ({"at_least": 1, "by": "energy"}, CANDIDATES, "energy"),
        ({"at_least": 1}, GraftPlan([Parallelize("pairs")]), "replaces operators"),
        ({"at_least": 1}, GraftPlan.empty(), "without candidates"),
    ],
)
def test_what_makes_no_search_is_refused_before_any_work(
    tmp_path: Path, arguments: dict[str, Any], candidates: GraftPlan, said: str
) -> None:
    with pytest.raises(PlanError, match=said):
        searched(tmp_path, candidates, **arguments)
    assert not (tmp_path / "search").exists()


def test_pairs_are_not_made_by_a_search(tmp_path: Path) -> None:
    recipe = load_recipe("demo-text")
    with pytest.raises(RunError, match="graft synthesize"):
        search_plan(recipe, CANDIDATES, tmp_path / "search", at_least=1)


def _search_as_one_of_several(folder: Path) -> tuple[dict[str, Any], str]:
    said = io.StringIO()
    return searched(folder, at_least=3, console=Console(said)), said.getvalue()


def test_several_processes_find_what_one_finds(tmp_path: Path) -> None:
    for name in ("one", "two"):
        tiny_recipe(tmp_path / name)
    one = searched(tmp_path / "one", at_least=3)
    several = together(2, _search_as_one_of_several, tmp_path / "two")
    for found, _ in several:
        assert found["chosen"]["plan"] == one["chosen"]["plan"]
        assert found["chosen"]["together"] == pytest.approx(one["chosen"]["together"], rel=1e-3)
    assert (tmp_path / "two" / "search" / "search.html").is_file()
    assert "[score] 01-mha-hyena_x" in several[0][1]
    assert several[1][1] == ""  # one of them speaks


class Second(Compute):
    """The second of two processes, with nobody to add up with."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def test_more_processes_than_samples_leave_some_without(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    teacher, data = load_model(recipe["model"]).eval(), load_dataset(recipe["data"])
    damage = Damage(
        teacher, data, FinetuneConfig(), Second(torch.device("cpu"), "fp32", rank=1, world=2), num_samples=1,
        at_once=4, seed=0,
    )  # fmt: skip
    assert damage.of({}) == 0


class Boundless(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 0


def test_a_prediction_that_is_not_finite_is_an_error_that_names_the_site(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    teacher, data = load_model(recipe["model"]).eval(), load_dataset(recipe["data"])
    given: dict[str, Any] = {"num_samples": 4, "at_once": 4, "seed": 0}
    compute = make_compute(torch.device("cpu"))
    damage = Damage(teacher, data, FinetuneConfig(), compute, **given)
    with pytest.raises(GraftError, match=r"'Boundless' at blocks\.1\.attn.*not finite in float32"):
        damage.of({"blocks.1.attn": Boundless()})
    assert damage.of({}) == 0
    teacher.set_submodule("blocks.1.attn", Boundless())
    with pytest.raises(GraftError, match="model's own prediction is not finite"):
        Damage(teacher, data, FinetuneConfig(), compute, **given)


def test_candidates_may_be_chosen_by_the_locality_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "locality.json").write_text(json.dumps({"locality": [0.1, 0.4, 0.3, 0.2]}))
    found = searched(
        tmp_path, GraftPlan([Replace("mha", "top-local-50", "hyena_x", train=False)]), at_least=1,
        changes={"locality": str(tmp_path / "locality.json")},
    )  # fmt: skip
    assert [site["layer"] for site in found["candidates"][0]["sites"]] == [1, 2]


def test_a_model_of_one_layer_has_no_interleaved_rules(tmp_path: Path) -> None:
    save_model(tiny_dit(depth=1), tmp_path / "one-layer")
    found = searched(
        tmp_path, GraftPlan([Replace("mha", "all", "hyena_x", train=False)]), at_least=1,
        changes={"model": str(tmp_path / "one-layer")},
    )  # fmt: skip
    assert [rule["rule"] for rule in found["rules"]] == ["all"]


def test_a_model_without_a_null_class_is_measured_without_label_dropout(tmp_path: Path) -> None:
    save_model(tiny_dit(null_class=False), tmp_path / "no-null")
    found = searched(
        tmp_path, GraftPlan([Replace("mha", [1], "hyena_x")]), at_least=1,
        changes={"model": str(tmp_path / "no-null"), "distill": {"label_dropout": 0.0}, "finetune": None},
    )  # fmt: skip
    assert found["chosen"]["together"] > 0


def test_a_graft_that_needs_its_base_is_refused_before_any_work(tmp_path: Path) -> None:
    teacher = load_model(tiny_recipe(tmp_path)["model"])
    save_graft(graft(teacher, [Replace("mlp", [0], "mlp", {"ratio": 2})]), tmp_path / "graft")
    with pytest.raises(PlanError, match="search on the model that it was made of"):
        searched(
            tmp_path, GraftPlan([Replace("mha", "all", "hyena_x")]), at_least=1,
            changes={"model": str(tmp_path / "graft")},
        )  # fmt: skip
    assert not (tmp_path / "search").exists()


def test_a_hundred_candidates_have_a_hundred_names() -> None:
    from grafting.report.search import _labels

    names = [f"{number:02d}-mha-hyena_x" for number in range(1, 121)]
    entry = Replace("mha", [0], "hyena_x").to_dict()
    assert len(set(_labels({"candidates": [{"name": name, **entry} for name in names]}).values())) == 120


def test_the_command_prints_the_choice(tmp_path: Path) -> None:
    import yaml

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(tmp_path)))
    CANDIDATES.save(tmp_path / "candidates.yaml")
    arguments = ["search", str(tmp_path / "recipe.yaml"), "--candidates", str(tmp_path / "candidates.yaml"),
                 "--replace", "2", "--num", "16", "--out", str(tmp_path / "out")]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Chosen:" in result.stdout
    page = (tmp_path / "out" / "search.html").read_text()
    assert "mha: swa (window 2)" in page
    assert "interleaved-50" in page
    shown = CliRunner().invoke(app, [*arguments, "--json", "--resume"])  # as the word of a stop says
    assert json.loads(shown.stdout)["chosen"]["replaced"] == 2
