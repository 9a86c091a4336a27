"""The report: what it says is what the run folder holds, nothing in it can run, nothing missing stops it."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grafting.errors import RunError
from grafting.evaluation.samples import write_samples
from grafting.report import format as fmt
from grafting.report import write_report, write_study
from grafting.report.html import CSP, Column, Html, data_table, el
from grafting.report.images import by_class, pair_distance, strip
from grafting.report.plots import Point, Series, line_plot, points_of, scatter_plot, spikes
from grafting.report.text import lines, number, results_table, table

LAYERS = (1, 3, 5)
PATHS = [f"blocks.{layer}.attn" for layer in LAYERS]
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e\x00\ud800"
VOID = {"img", "meta", "br"}


class Page(HTMLParser):
    """Elements, their attributes, and text; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def metrics(steps: int = 40) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        found.append(
            {
                "stage": "distill",
                "step": step,
                "lr": 1e-3,
                "loss": {p: math.exp(-step / 20) + i for i, p in enumerate(PATHS)},
            }
        )
        found.append(
            {
                "stage": "finetune",
                "step": step,
                "lr": 1e-4,
                "loss": 9.0 if step == 30 else 0.2 + 0.01 * (step % 3),
                "terms": {"diffusion": 0.3, "output": 0.1},
                "grad_norm": None if step == 30 else 1.0,
            }
        )
        if step % 10 == 0:
            found.append(
                {
                    "stage": "distill",
                    "step": step,
                    "event": "validation",
                    "error": dict.fromkeys(PATHS, 0.5 - step / 200),
                }
            )
            found.append({"stage": "finetune", "step": step, "event": "validation", "loss": 0.1})
    return found


def run_state() -> dict[str, Any]:
    edits = [
        {
            "layer": layer,
            "target": "mha",
            "path": path,
            "from": "mha",
            "to": "hyena_x",
            "config": {"kernel_size": 4},
            "init": "donor",
            "params": [1000, 1030],
            "flops": [200.0, 150.0],
        }
        for layer, path in zip(LAYERS, PATHS, strict=True)
    ]
    comparison = {
        "metrics": {
            "fd": {"a": 20.0, "b": 25.0, "difference": 5.0, "ratio": 1.25},
            "label_accuracy": {"a": 0.8, "b": 0.79, "difference": -0.01, "ratio": 0.9875},
        },
        "protocol": {
            "num_samples": 60,
            "sampler": "dpm++",
            "steps": 10,
            "reference": {"name": "train", "hash": "ab" * 32, "num": 60000},
        },
        "differs": {"model": ["teacher", "student"]},
    }
    return {
        "version": 1,
        "stages": {
            "graft": {
                "num_layers": 6,
                "model": {"params": [100_000, 100_090], "flops_per_image": [10_000.0, 9_850.0]},
                "edits": edits,
            },
            "distill": {
                "start_error": {
                    "random": dict.fromkeys(PATHS, 1.1),
                    "copied": dict.fromkeys(PATHS, 0.9),
                    "fitted": dict.fromkeys(PATHS, 0.6),
                },
                "final_error": dict.fromkeys(PATHS, 0.3),
                "best_step": dict.fromkeys(PATHS, 40),
                "rested": {PATHS[0]: 30},
                "steps": 40,
                "image_visits": 640,
                "flops": 6.4e6 + 3 * 450 * 640,
                "seconds": 65.0,
                "share_of_pretraining": 0.004,
            },
            "finetune": {
                "steps": 40,
                "image_visits": 640,
                "flops": 640 * (3 * 9850 + 10_000),
                "seconds": 120.0,
                "trained_params": 100_090,
                "ema_decay": 0.75,
                "validation": {"40": 0.1},
                "skipped_steps": 0,
                "share_of_pretraining": 0.005,
            },
            "sample": {"seconds": {"teacher": 3.0, "student": 2.0}, "num": 60},
            "evaluate": comparison,
        },
        "environment": {"python": "3.12", "torch": "2.9", "threads": 2},
    }


def make_run(folder: Path, *, name: str = "half", about: str = "Half becomes hyena_x.") -> Path:
    """A whole run folder, without a model."""
    recipe = {
        "name": name,
        "about": about,
        "model": "dit-fashion",
        "data": "fashion-10",
        "plan": [
            {"replace": {"target": "mha", "layers": list(LAYERS), "with": {"hyena_x": {"kernel_size": 4}}}}
        ],
        "distill": {"mode": "one-pass", "losses": {"mha": "l1"}},
        "finetune": {"objectives": {"diffusion": 0.1, "output": 1.0}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "plan.yaml").write_text("version: 1\nentries: []\n")
    state = run_state()
    (folder / "run.json").write_text(json.dumps(state))
    evaluation = {"comparison": state["stages"]["evaluate"]}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in metrics()) + '{"stage": "fine'
    )
    labels = np.arange(60) % 10
    for seed, who in enumerate(("teacher", "student")):
        images = np.random.default_rng(seed).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
        write_samples(
            folder / "samples" / f"{who}.npz", images, labels, {"seed": 0, "steps": 10, "model": who}
        )
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(make_run(tmp_path_factory.mktemp("run"))).read_text(encoding="utf-8")


def check_inert(page: str) -> Page:
    """A page that may load and run nothing."""
    parsed = Page(page)
    assert {"http-equiv": "Content-Security-Policy", "content": CSP} in parsed.all("meta")
    for tag, attributes in parsed.elements:
        assert tag not in (
            "script",
            "iframe",
            "object",
            "embed",
            "link",
            "base",
            "form",
            "foreignobject",
            "image",
        )
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#"))
            if key == "style":
                assert "url(" not in (value or "").replace("url(#", "")
    assert "@import" not in page
    return parsed


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


def test_samples_are_shown_exactly() -> None:
    import base64
    import io

    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    uri, width, height = strip(images)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("L"))
    assert (width, height) == (28 * 8, 8 * 8)
    for i in range(3):
        np.testing.assert_array_equal(shown[:, 10 * i : 10 * i + 8], images[i, :, :, 0])


def test_by_class() -> None:
    labels = np.arange(40) % 10
    groups = by_class(labels, 40)
    assert [label for label, _ in groups] == list(range(10))
    assert groups[3] == (3, [3, 13, 23, 33])
    assert by_class(np.arange(40), 40) == [(None, list(range(s, s + 8))) for s in (0, 8, 16)]
    assert by_class(None, 3) == [(None, [0, 1, 2])]


def test_pair_distance() -> None:
    a, b = np.full((2, 1, 1, 1), 250, np.uint8), np.full((2, 1, 1, 1), 5, np.uint8)
    assert pair_distance(a, b) == 245.0


def test_spikes() -> None:
    values = [1.0 + 0.01 * (i % 4) for i in range(60)]
    assert spikes(values) == []
    values[40] = 3.0
    assert spikes(values) == [40]
    assert spikes([math.exp(-i / 10) for i in range(60)]) == []
    assert spikes([0.0] * 10) == []


def test_plots_take_strange_input() -> None:
    svg = line_plot([Series("a", [1, 2], [0.0, -1.0])], 'a "b" <c>', log_y=True)
    assert 'aria-label="a &quot;b&quot; &lt;c&gt;"' in svg
    assert line_plot([Series("one", [1.0], [1.0])], "one", log_y=True).startswith("<svg")
    x, y = points_of([(1, 1e300), (3, 1e-300), (2, 1e30), ("a", 1), (4, None), (5, float("nan"))])
    assert (x, y) == ([2, 3], [1e30, 1e-300])
    assert line_plot([Series("wide", x, y)], "wide", log_y=True).startswith("<svg")
    points = [Point(f"$x_{{ {i} <b> 漢字", float(i % 2), 1.0, 0.1) for i in range(4)]
    assert "<b>" not in scatter_plot(points, "points", x_label="$\\bad", y_label="<y>")


def test_escaping_by_construction() -> None:
    assert (
        el("p", "<b>", el("i", "&"), ["x", None, 3], title='"')
        == '<p title="&quot;">&lt;b&gt;<i>&amp;</i>x3</p>'
    )
    assert el("td", Html("<b></b>"), class_="n") == '<td class="n"><b></b></td>'
    rows = [[str(i), i] for i in range(500)]
    assert "100 more rows are not shown." in data_table("t", [Column("a", True), Column("b")], rows)


@pytest.mark.parametrize(("value", "text"), [
    (0.123456, "0.1235"), (33.1502, "33.15"), (1234.5, "1,234"), (-2.5, "−2.500"), (0, "0"), (1.5e-9, "1.50e−9"),
    (None, "–"), (float("nan"), "–"), (True, "–"), (10**400, "–"),
])  # fmt: skip
def test_significant(value: Any, text: str) -> None:
    assert fmt.significant(value) == text


def test_formats() -> None:
    plain = [
        fmt.si(3660320), fmt.si(331e6, "FLOPs"), fmt.si(12), fmt.percent(0.000157), fmt.change(-0.0348),
        fmt.change(0.0), fmt.ratio(1.617), fmt.duration(177), fmt.duration(3.04), fmt.duration(7500), fmt.count(1e6),
        fmt.duration("x"),
    ]  # fmt: skip
    assert [text.replace("\u00a0", " ") for text in plain] == [
        "3.66 M", "331 MFLOPs", "12.0", "0.0157 %", "−3.48 %", "0 %", "1.62×", "2 min 57 s", "3.0 s", "2 h 05 min",
        "1,000,000", "–",
    ]  # fmt: skip
    assert fmt.ranges([1, 3, 5]) == "1, 3, 5"
    assert fmt.ranges(range(1, 28, 2)) == "1, 3, …, 27"
    assert fmt.ranges([0, 1, 2, 3, 7, 8]) == "0–3, 7, 8"


def study(tmp_path: Path) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for seed, name in enumerate(("base", "half", "<b>all</b>")):
        images = np.random.default_rng(seed).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
        write_samples(tmp_path / "rows" / f"{seed}.npz", images, np.arange(20) % 10, {"seed": 0})
        rows.append({"name": name, "label": name, "fd": 20.0 + seed, "flops": 1.0 - seed / 10, "std": {"fd": 0.5},
                     "samples": f"rows/{seed}.npz", "seconds": 60.0 * seed})  # fmt: skip
    rows.append(
        {"name": "failed", "label": "failed", "fd": None, "flops": float("nan"), "samples": "rows/none.npz"}
    )
    return {
        "name": "ablation", "title": "An ablation", "about": "What each part gives.", "rows": rows,
        "columns": [{"key": "fd", "label": "Fréchet distance"}, {"key": "flops", "label": "FLOPs"}],
        "findings": ["Half is enough."], "environment": {"torch": "2.9"}, "scatter": {"x": "flops", "y": "fd"},
    }  # fmt: skip


def test_study_page(tmp_path: Path) -> None:
    path = write_study(tmp_path, study(tmp_path))
    assert path == tmp_path / "study.html"
    page = check_inert(path.read_text(encoding="utf-8"))
    assert "half 21.00 ± 0.50 0.9000 1 min 00 s" in page.text
    assert "failed – – –" in page.text
    assert "Samples of failed could not be read" in page.text
    assert "A column shares its starting noise" in page.text
    assert len(page.all("img")) == 3
    assert len(page.all("svg")) == 1
    assert path.read_bytes() == write_study(tmp_path, study(tmp_path)).read_bytes()
    with pytest.raises(RunError, match="needs rows"):
        write_study(tmp_path, {"rows": []})


def test_text_tables(tmp_path: Path) -> None:
    assert number(3660320) == "3.66M"
    assert number([3660320, 3671840]) == "3.66M -> 3.672M"
    assert number(123456.0) == "123.5k"
    assert (
        table(("a", "b"), [{"a": "x", "b": 1.0}, {"a": "long", "b": 10.5}])
        == "a        b\nx        1\nlong  10.5"
    )
    assert list(lines({"a": {"b": 1}, "c": [1, 2, 3]})) == ["a", "  b: 1", "c: 1,2,3"]
    assert results_table(tmp_path) == ""
    found = results_table(make_run(tmp_path / "run")).splitlines()
    assert found[0].split() == ["teacher", "student", "ratio", "better"]
    assert found[1].split() == ["fd", "20", "25", "1.25", "lower"]
