"""What would have no effect is refused; what can be known before the work is said before it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_dit
from tiny_runs import tiny_pipeline, tiny_recipe

from grafting import GraftError, GraftPlan, Replace, graft, load_model
from grafting.card import model_card
from grafting.console import Console
from grafting.data import open_images
from grafting.errors import CheckpointError, DataError, RunError
from grafting.evaluation.measure import check_measures
from grafting.evaluation.samples import write_samples
from grafting.formats.published import export_published, import_published
from grafting.recipes import load_recipe
from grafting.report import gallery
from grafting.report.images import Samples
from grafting.studies import run_study
from grafting.surgery import record_of
from grafting.synthesis import Synthesis

Command = Callable[..., str]


@pytest.mark.parametrize(
    "option", [["--compile"], ["--repeat", "2"], ["--batch-size", "2"], ["--warm-up", "1"]]
)
def test_options_of_a_measurement_without_one(
    graft_command: Command, tmp_path: Path, option: list[str]
) -> None:
    GraftPlan([Replace("mha", [1], "hyena_x")]).save(tmp_path / "p.yaml")
    with pytest.raises(AssertionError, match=f"exit 2.*{option[0]} is for a measurement: give --measure"):
        graft_command("cost", "arch:DiT-S/8-D2", "--plan", tmp_path / "p.yaml", *option)


def test_options_of_a_measure_that_is_not_asked_for(graft_command: Command, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="--features fashion is for a --reference"):
        graft_command("evaluate", tmp_path / "a.npz", "--clip", "some/clip", "--features", "fashion")
    with pytest.raises(AssertionError, match="--captions is for --clip"):
        graft_command("evaluate", tmp_path / "a.npz", "--reference", "fashion-train", "--captions", "c.txt")


@pytest.mark.parametrize("given", [{"only": ["mha"]}, {"jobs": 2}, {"reuse": [Path("other")]}])
def test_rows_of_a_study_that_has_none(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(RunError, match=r"donor-init.*leave out --only, --jobs and --reuse"):
        run_study("donor-init", tmp_path / "study", Console(quiet=True), **given)
    assert not (tmp_path / "study").exists()


def test_overrides_leave_a_given_mapping_as_it_is(tmp_path: Path) -> None:
    given = tiny_recipe(tmp_path)
    before = json.dumps(given)
    assert load_recipe(given, ["distill.steps=7"]).distill.steps == 7  # type: ignore[union-attr]
    assert json.dumps(given) == before


@pytest.mark.parametrize("steps", [0, 1001])
def test_synthesis_knows_its_steps_before_captions_are_encoded(steps: int) -> None:
    with pytest.raises(GraftError, match=f"steps={steps}"):
        Synthesis(num=4, steps=steps)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sample": {"vae": "some/vae"}}, "makes pixels"),
        ({"evaluate": {"reference": "fashion-train"}}, r"fashion features take .* \[1, 8, 8, 1\]"),
        ({"evaluate": {"reference": "teacher"}}, r"which features suit images of \[8, 8, 1\]"),
        ({"evaluate": {"reference": "fashion-train", "features": "emoji"}}, r"emoji features take"),
    ],
)
def test_a_run_that_could_not_end_does_not_begin(
    tmp_path: Path, graft_command: Command, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(GraftError, match=reason):
        tiny_pipeline(tmp_path, **changes).all()
    assert not (tmp_path / "run" / "graft").exists()
    (tmp_path / "r.json").write_text(json.dumps(tiny_recipe(tmp_path, **changes)))
    with pytest.raises(AssertionError, match="exit 2"):
        graft_command("run", tmp_path / "r.json", "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_stage_alone_asks_for_no_measures(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path, evaluate={"reference": "fashion-train"}).check()


def test_features_are_tried_on_a_black_image(tmp_path: Path) -> None:
    check_measures("teacher", "auto", (32, 32, 1))
    check_measures("fashion-train", "fashion", (32, 32, 1))
    with pytest.raises(DataError, match="packaged fashion classifier, not of 'emoji'"):
        check_measures("fashion-train", "emoji", (32, 32, 3))
    write_samples(tmp_path / "r.npz", np.zeros((4, 8, 8, 1), np.uint8), np.arange(4), {})
    with pytest.raises(DataError, match="cannot tell which features suit"):
        check_measures(tmp_path / "r.npz", "auto", (8, 8, 1))


def test_a_file_of_other_mlps_points_to_import(tmp_path: Path) -> None:
    student = graft(tiny_dit(), GraftPlan([Replace("mlp", [1, 2], "mlp", {"ratio": 3})]))
    export_published(student, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"MLPs are 96 and 128 wide.*graft import"):
        load_model(tmp_path / "m.pt", num_heads=4)
    record = record_of(import_published(tmp_path / "m.pt", num_heads=4))
    assert record is not None
    assert record.plan.sites.keys() == {("mlp", 1), ("mlp", 2)}


def test_the_card_of_a_run_that_made_its_own_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_pipeline(tmp_path)
    pipeline.graft()
    folder, monkeypatched = pipeline.run.path, []
    recipe = pipeline.run.recipe() | {"synthesize": {"prompts": "emoji-train"}, "data": "pairs"}
    monkeypatch.setattr(type(pipeline.run), "recipe", lambda run: recipe)
    (folder / "pairs").mkdir()
    made = {"num": 12, "sampler": "dpm++", "steps": 3, "guidance": 2.0, "seed": 0}
    (folder / "pairs" / "captions.json").write_text("{}")
    monkeypatch.setattr(
        "grafting.data.text.read_manifest", lambda path: monkeypatched.append(path) or {"protocol": made}
    )
    assert "12 image-text pairs sampled from the base itself: dpm++, 3 steps" in model_card(folder)
    assert monkeypatched == [folder / "pairs"]


def test_one_captioned_sample_makes_a_page() -> None:
    one = Samples(np.zeros((1, 8, 8, 3), np.uint8), None, {}, 1)
    assert "differs by 0.0 of 255 levels on average." in gallery._captioned(
        {"teacher": one, "student": one}, ["a cat"], []
    )


def test_images_of_a_latent_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from grafting.families import codec

    vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=(8, 8, 8), out_channels=3))
    monkeypatch.setattr(codec, "load_vae", lambda *_: vae)
    assert codec.image_shape(tiny_dit(in_channels=4)) == (32, 32, 3)
    assert codec.image_shape(tiny_dit()) == (8, 8, 1)


def test_captions_that_are_encoded_already_are_neither_cut_nor_padded(
    graft_command: Command, tmp_path: Path
) -> None:
    given = (
        "synthesize",
        "pixart-emoji",
        "--prompts",
        "emoji-train",
        "--num",
        "2",
        "--out",
        tmp_path / "pairs",
    )
    for option in (["--max-tokens", "3"], ["--truncate"]):
        with pytest.raises(AssertionError, match=r"encoded already: leave out max_tokens and truncate"):
            graft_command(*given, *option)
    assert not (tmp_path / "pairs").exists()


def test_options_of_another_kind_of_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="--label-column means nothing"):
        open_images(tmp_path / "images", label_column="label")
    (tmp_path / "images" / "a.tar").touch()
    with pytest.raises(DataError, match="--follow-links means nothing"):
        open_images(tmp_path / "images", follow_links=True)


def test_heads_that_a_text_to_image_model_does_not_have() -> None:
    with pytest.raises(CheckpointError, match=r"has 16 heads, not num_heads=7"):
        load_model("arch:PixArt-Sigma-256", device="meta", num_heads=7)


@pytest.mark.parametrize(("name", "meant"), [("demoo", "demo"), ("table4/mha-swaa-50", "mha-swa-50")])
def test_a_name_with_a_slip_is_recognised(name: str, meant: str) -> None:
    with pytest.raises(RunError, match=f"did you mean '{meant}'"):
        load_recipe(name)
