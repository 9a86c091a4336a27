"""What a study says of its rows: findings beyond the noise, means over seeds, ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from study_tools import tiny_study

from grafting.recipes import depth
from grafting.recipes.rows import Claim, Row, Study
from grafting.report import write_study
from grafting.studies.collect import collect
from grafting.studies.findings import FAILS, HOLDS, OPEN, UNCLEAR, noise_of, sentences, test_claims
from grafting.studies.row_run import Setting

test_claims.__test__ = False  # type: ignore[attr-defined]


def test_a_finding_counts_beyond_two_deviations() -> None:
    rows = [{"distance": d, "unedited": True} for d in (5.0, 5.2, 5.4, 5.6)]
    noise = noise_of(rows)
    assert noise["deviation"] == pytest.approx((0.2 / 3) ** 0.5)  # 0.258: a margin of 0.516
    distances = {"a": 6.0, "b": 6.5, "c": 6.6, "d": 7.2}
    named: dict[str, Any] = {name: {"distance": value} for name, value in distances.items()} | {
        "x": {"diverged": True}
    }

    def verdict(*groups: tuple[str, ...], over: float | None = None) -> str:
        study = tiny_study(claims=(Claim("", groups, over),))
        return str(test_claims(study, named, noise)[0]["verdict"])

    assert verdict(("a",), ("b",)) == UNCLEAR
    assert verdict(("a",), ("c",)) == HOLDS
    assert verdict(("c",), ("a",)) == FAILS
    assert verdict(("a",), ("c",), ("d",)) == HOLDS
    assert verdict(("a",), ("b",), ("d",)) == UNCLEAR
    assert verdict(("a", "b"), ("d",)) == HOLDS  # every one of the first against every one of the second
    assert verdict(("a", "d"), ("c",)) == FAILS
    assert verdict(("d",), ("x",)) == HOLDS  # a row that diverged is worse than any
    assert verdict(("x",), ("a",)) == FAILS
    assert verdict(("a",), ("missing",)) == OPEN
    # 7.2 against 1.3 x 5.3 = 6.89 with a margin of 1.3 x 0.516 = 0.671, and so on
    assert verdict(("d", "x"), over=1.3) == UNCLEAR
    assert verdict(("c", "x"), over=1.3) == UNCLEAR
    assert verdict(("d", "x"), over=1.2) == HOLDS  # 0.84 over, 0.62
    assert verdict(("a", "x"), over=1.3) == FAILS  # 0.89 under, 0.671
    assert verdict(("x",), over=1.3) == HOLDS


def test_a_finding_waits_for_every_noise_seed_of_the_teacher() -> None:
    rows: dict[str, dict[str, Any]] = {
        "t0": {"name": "t0", "unedited": True, "distance": 5.0},
        "t1": {"name": "t1", "unedited": True, "distance": 5.2},
        "t2": {"name": "t2", "unedited": True, "distance": None},
        "t3": {"name": "t3", "unedited": True, "distance": None, "failed": True},
        "a": {"name": "a", "distance": 6.0}, "b": {"name": "b", "distance": 7.0},
        "c": {"name": "c", "distance": None, "failed": True}, "d": {"name": "d", "distance": None, "failed": False},
    }  # fmt: skip
    claims = (Claim("p", (("a",), ("b",))), Claim("q", (("a", "c"), ("d", "e"))),
              Claim("r", (("a",), ("b",)), paper=False))  # fmt: skip
    study = tiny_study(claims=claims)

    def tested() -> tuple[list[dict[str, Any]], list[str]]:
        noise = noise_of(list(rows.values()))
        found = test_claims(study, rows, noise)
        return found, sentences(study, found, noise)

    found, said = tested()
    assert [claim["verdict"] for claim in found] == [OPEN] * 3
    assert found[0]["why"] == "noise seeds of the teacher: failed: t3; not run: t2"
    assert "over 2 of 4 noise seeds" in said[0]
    assert said[1].startswith("Of 2 findings of the paper 0 hold here")
    assert said[1].endswith("; 2 not tested.")
    rows["t2"]["distance"], rows["t3"] = 5.4, {"name": "t3", "unedited": True, "distance": 5.6}
    found, said = tested()
    assert [claim["verdict"] for claim in found] == [HOLDS, OPEN, HOLDS]  # 1.0 apart, beyond 2 x 0.258
    assert found[0]["margin"] == pytest.approx(2 * (0.2 / 3) ** 0.5)
    assert found[1]["why"] == "failed: c; left out: d; not run: e"
    assert "beyond 0.52" in said[0]
    assert said[1:] == [
        "Of 2 findings of the paper 1 holds here, 0 do not, 0 can't be told from noise; 1 not tested.",
        "Of 1 claim of our own 1 holds here, 0 do not, 0 can't be told from noise.",
    ]


def test_the_page_says_why_a_claim_is_not_tested_and_whose_it_is(tmp_path: Path) -> None:
    claims = [
        {"text": "p", "verdict": OPEN, "own": False, "why": "failed: c"},
        {"text": "r", "verdict": HOLDS, "own": True},
    ]
    page = write_study(tmp_path, {"rows": [{"label": "a"}], "claims": claims}).read_text()
    assert all(text in page for text in ("failed: c", "our own", "why it is not tested"))
    page = write_study(
        tmp_path, {"rows": [{"label": "a"}], "claims": [{"text": "p", "verdict": HOLDS}]}
    ).read_text()
    assert "our own" not in page
    assert "why it is not tested" not in page


def _result(study: Study, folder: Path, row: str, distance: float, depth: list[int] | None = None) -> Setting:
    setting = Setting(study, folder)
    file = setting.result_file(row)
    file.parent.mkdir(parents=True)
    model = {} if depth is None else {"depth": depth}
    file.write_text(
        json.dumps(
            {"seed": study.row(row).seed, "metrics": {"fd": distance}, "cost": {"rows": [], "model": model}}
        )
    )
    return setting


def test_a_study_without_claims_ranks_its_rows(tmp_path: Path) -> None:
    study = tiny_study(
        Row("t", "t", teacher="as it is"), Row("u", "u", teacher="other noise", seed=1), Row("far", "far"),
        Row("near", "near"),
    )  # fmt: skip
    for row, distance in (("t", 5.0), ("u", 5.2), ("far", 10.0)):
        _result(study, tmp_path, row, distance)
    data = collect(_result(study, tmp_path, "near", 6.0, [12, 6]))
    assert data["findings"][0].startswith(
        "Noise: over 2 noise seeds the teacher's distance is 5.10 with a standard"
    )
    assert data["findings"][1:] == [
        "near: 1.20 times the teacher's distance.", "far: 2.00 times the teacher's distance.",
    ]  # fmt: skip
    assert {row["name"]: row["depth"] for row in data["rows"]} == {"t": 12, "u": 12, "far": None, "near": 6}


def test_a_mean_over_seeds_counts_what_went_into_it() -> None:
    def said(*overs: float | None) -> str:
        rows = [
            {"name": f"concat-s{i}", "distance": 6.0, "over_teacher": over} for i, over in enumerate(overs)
        ]
        return str(depth.summarize(rows)["findings"][0])

    assert said(1.2, None, None).endswith("concat: 1.20 times the teacher's distance (one seed).")
    assert said(1.2, 1.4, None).endswith("concat: 1.30 times the teacher's distance (mean of 2).")
