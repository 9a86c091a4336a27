"""The report: what it says is what the run folder holds, nothing in it can run, nothing missing stops it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_tools import Page, check_inert, make_run, metrics, run_state, study

from grafting.errors import RunError
from grafting.evaluation.samples import write_samples
from grafting.report import write_report, write_study
from grafting.report.html import CSP

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e\x00\ud800"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(make_run(tmp_path_factory.mktemp("run"))).read_text(encoding="utf-8")


def test_policy_allows_inline_style_and_data_images_only() -> None:
    assert CSP.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_whole_run(whole: str) -> None:
    page = check_inert(whole)
    text = page.text
    assert "could not be made" not in text
    assert (
        "In 3 of the 6 blocks of dit-fashion (1, 3, 5), hyena_x (kernel_size 4) takes the place of attention."
        in text
    )
    for figure in ("1.25×", "−1.50\u00a0%".replace("\u00a0", " "), "0.900 %", "3 min 05 s"):
        assert figure in text, figure
    assert "against train (60000 images, hash abababababab)" in text
    assert "1 loss spike (circled) at step 30" in text
    assert "t-shirt" in text
    assert "Missing" not in text
    assert all(image.get("alt") for image in page.all("img"))
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in page.all("svg"))
    assert all(th.get("scope") in ("col", "row") for th in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    ids = re.findall(r' id="([^"]+)"', whole)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([\w.-]+)', whole)) <= set(ids)


def test_costs_are_counted_as_the_paper_counts(whole: str) -> None:
    text = Page(whole).text
    # 3 of 6 operators, each -25 % FLOPs and +3 % parameters: half of that of all operators of the target
    assert "attention → hyena_x (kernel_size 4) 1, 3, 5 50 % −12.50 % +1.50 %" in text
    # stage 1: 640 teacher passes and three operator passes each; stage 2: the objective 'output' has the teacher too
    assert "stage 1, distillation 40 640 7.26 MFLOPs 6.40 MFLOPs 0.400 % 1 min 05 s" in text
    assert "both stages 80 1,280 32.6 MFLOPs 12.8 MFLOPs 0.900 % 3 min 05 s" in text


def test_same_folder_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_error_table(whole: str) -> None:
    text = Page(whole).text
    assert "blocks.1.attn hyena_x (kernel_size 4) 1.10 0.900 0.600 0.300 40 30" in text
    assert "mean 1.10 0.900 0.600 0.300" in text


def test_html_in_files_is_text(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", name="<script>alert(1)</script>", about="</style><script>alert(2)</script>"
    )
    state = run_state()
    state["environment"] = {EVIL: EVIL}
    for edit in state["stages"]["graft"]["edits"]:
        edit |= {"to": EVIL, "from": EVIL, "init": EVIL, "config": {EVIL: EVIL}, "target": EVIL}
    state["stages"]["graft"]["edits"][0]["path"] = EVIL
    state["stages"]["distill"]["final_error"][EVIL] = 0.5
    (run / "run.json").write_text(json.dumps(state))
    records = [
        {"stage": "distill", "step": step, "loss": {EVIL: 1.0 / step, "$\\frac{": 0.1, "</svg><script>": 0.2}}
        for step in (1, 2, 3)
    ] + [
        {"stage": "finetune", "step": step, "loss": 1.0, "terms": {EVIL: 0.5, "b": 1.0}} for step in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    evil: dict[str, Any] = {
        "metrics": {EVIL: {"a": 1.0, "b": 2.0, "ratio": 2.0}},
        "protocol": {EVIL: EVIL, "sampler": EVIL},
        "differs": {EVIL: [EVIL]},
    }
    (run / "evaluation.json").write_text(json.dumps({"comparison": evil}))
    (run / "plan.yaml").write_text("</pre><script>alert(3)</script>")
    page = check_inert(write_report(run).read_text(encoding="utf-8"))
    assert "could not be made" not in page.text
    assert "<script>alert(1)</script>" in page.text
    assert "\u202e" not in page.text


@pytest.mark.parametrize("left", [
    ("run.json",), ("recipe.yaml",), ("run.json", "recipe.yaml"), ("run.json", "metrics.jsonl"),
    ("run.json", "evaluation.json"), ("run.json", "recipe.yaml", "samples/teacher.npz"),
])  # fmt: skip
def test_partial_run(tmp_path: Path, left: tuple[str, ...]) -> None:
    run = make_run(tmp_path / "run")
    for path in [p for p in run.rglob("*") if p.is_file()]:
        if path.relative_to(run).as_posix() not in left:
            path.unlink()
    page = check_inert(write_report(run).read_text(encoding="utf-8"))
    assert "could not be made" not in page.text
    if "samples/teacher.npz" not in left:
        assert "there are no samples of the student yet" in page.text
    else:
        assert "Missing: there are no samples of the student yet." in page.text


@pytest.mark.parametrize("stage", ["graft", "distill", "finetune", "sample", "evaluate"])
def test_missing_stage_is_named(tmp_path: Path, stage: str) -> None:
    run = make_run(tmp_path / "run")
    state = run_state()
    del state["stages"][stage]
    (run / "run.json").write_text(json.dumps(state))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert f"This run is not complete: {stage} not done." in page.text
    assert "could not be made" not in page.text


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "run.json").write_text("{")
    (run / "recipe.yaml").write_text("a: !!python/object:os.system x\n")
    (run / "samples" / "student.npz").write_bytes(b"PK")
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe[1]\n7\n")
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "run.json could not be read" in text
    assert "recipe.yaml could not be read" in text
    assert "samples of the student could not be read" in text
    assert "could not be made" not in text


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unlike_noise_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    images = np.zeros((60, 8, 8, 1), np.uint8)
    write_samples(run / "samples" / "student.npz", images, np.arange(60) % 10, {"seed": 1, "steps": 10})
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "Not the same noise: the two files differ in seed." in text
    assert "from the same starting noise" not in text


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(EVIL)
_JSON = st.recursive(
    _SCALARS,
    lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=4), c, max_size=3),
    max_leaves=6,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in _places(item, (*path, key)))]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere(tmp_path: Path, data: st.DataObject) -> None:
    """One value of run.json, of one record and of the evaluation is replaced by any JSON value."""
    run = tmp_path / "run"
    if not run.exists():
        make_run(run)
        for who in ("teacher", "student"):
            (run / "samples" / f"{who}.npz").unlink()
    (run / "evaluation.json").unlink(missing_ok=True)
    state = run_state()
    _replace(data, state)
    (run / "run.json").write_text(json.dumps(state))
    records = metrics(6)
    for record in records:
        if data.draw(st.integers(0, 3)) == 0:
            _replace(data, record)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "could not be made" not in text


def _replace(data: st.DataObject, target: dict[str, Any]) -> None:
    place = data.draw(st.sampled_from([place for place in _places(target) if place]))
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = data.draw(_JSON)


def test_size_with_a_thousand_samples(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for who in ("teacher", "student"):
        images = np.random.default_rng(0).integers(
            0, 256, (1000, 128, 128, 3), dtype=np.uint8
        )  # noise: the worst case
        write_samples(run / "samples" / f"{who}.npz", images[:200], np.arange(200), {"seed": 0})
    assert write_report(run).stat().st_size < 3e6
    for who in ("teacher", "student"):
        images = np.random.default_rng(0).integers(0, 256, (1000, 32, 32, 3), dtype=np.uint8)
        write_samples(run / "samples" / f"{who}.npz", images, np.arange(1000) % 10, {"seed": 0})
    assert write_report(run).stat().st_size < 3e6


def test_study_page(tmp_path: Path) -> None:
    path = write_study(tmp_path, study(tmp_path))
    assert path == tmp_path / "study.html"
    page = check_inert(path.read_text(encoding="utf-8"))
    assert "half 21.0 ± 0.5 0.9 1 min 00 s" in page.text
    assert "failed – – –" in page.text
    assert "Samples of failed could not be read" in page.text
    assert "A column shares its starting noise" in page.text
    assert len(page.all("img")) == 3
    assert len(page.all("svg")) == 1
    assert path.read_bytes() == write_study(tmp_path, study(tmp_path)).read_bytes()
    with pytest.raises(RunError, match="needs rows"):
        write_study(tmp_path, {"rows": []})


def test_study_page_of_many_rows(tmp_path: Path) -> None:
    """What is the same everywhere is said once, what was not run is said in place of figures, groups have one name."""
    about = {"unedited": False, "depth": 12, "flops_op_pct": -50.0, "paper": "x"}
    rows: list[dict[str, Any]] = [
        {"name": f"teacher-{seed}", "label": f"teacher, noise seed +{seed}", "distance": 5.0 + seed / 10, "depth": 12,
         "unedited": True, "flops": 3.0e8, "seed": seed} for seed in range(3)
    ]  # fmt: skip
    rows += [
        about | {"name": f"se-{share}", "label": f"Hyena-SE, {share} %", "group": "se", "distance": share / 10,
                 "flops": 3.0e8 - 1e5 * share, "seed": 0, "paper_fid": 2.5 if share < 90 else "x"}
        for share in (50, 75, 100)
    ]  # fmt: skip
    rows.append(about | {"name": "random", "label": "random", "distance": 176.3, "flops": 2.9e8, "seed": 0})
    rows.append({"name": "later", "label": "later", "distance": None, "status": "not run"})
    for number, row in enumerate(rows[:-1]):
        row["samples"] = f"rows/{number}.npz"
        pixels = np.full((4, 8, 8, 1), number, dtype=np.uint8)
        write_samples(tmp_path / row["samples"], pixels, np.arange(4), {"seed": row["seed"]})
    keys = ("distance", "depth", "paper_fid", "flops_op_pct", "flops", "status")
    claims = [
        {"text": "50 % is best", "verdict": "holds", "figures": "5.0 < 7.5", "paper": "– < –"},
        {"text": "100 % is best", "verdict": "does not hold", "figures": "10.0 < 5.0", "paper": "– < –"},
    ]
    path = write_study(tmp_path, {
        "rows": rows, "columns": [{"key": key, "label": key} for key in keys], "claims": claims,
        "noise": {"mean": 5.1, "deviation": 0.1, "margin": 0.2}, "scatter": {"x": "flops", "y": "distance"},
    })  # fmt: skip
    page = check_inert(path.read_text(encoding="utf-8"))
    text = page.text.replace("\u00a0", " ")
    assert "The same in all: depth 12. The same in all that are edited: flops_op_pct −50.00." in text
    assert "variant distance paper_fid flops teacher, noise seed +0 5.0 – 300 M" in text
    assert "Hyena-SE, 100 % 10.0 x 290 M random 176.3 – 290 M later not run" in text
    assert '<td class="across" colspan="3">not run</td>' in path.read_text(encoding="utf-8")
    assert (
        "verdict finding distances here holds 50 % is best 5.0 < 7.5" in text
    )  # the paper gives none: no column
    assert "Not the same noise (they differ in seed): teacher, noise seed +1; teacher, noise seed +2." in text
    (drawn,) = re.findall(r"<svg.*?</svg>", path.read_text(encoding="utf-8"), flags=re.S)
    named = re.findall(r">([^<>]*[a-z]{4}[^<>]*)</text>", drawn)
    assert sorted(named) == ["Hyena-SE", "distance", "flops", "random: 176", "teacher"]
    assert "the band is the teacher's mean over noise seeds" in text
