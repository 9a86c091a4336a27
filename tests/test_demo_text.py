"""`pixart-emoji` and its demo: what ships, prompts without a text encoder, alignment, the run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pixart_tools import tiny_transformer

from grafting import draws, load_model
from grafting.assets import asset_path
from grafting.conditioning import Caption
from grafting.console import Console
from grafting.data import load_dataset
from grafting.data.packaged_captions import PackagedCaptions
from grafting.data.text import CaptionDataset
from grafting.diffusion import sample
from grafting.errors import CheckpointError, DataError, RunError
from grafting.evaluation import SampleFile, evaluate
from grafting.evaluation.emoji_classifier import GROUPS, load_emoji_classifier
from grafting.evaluation.feature_set import FeatureSet
from grafting.evaluation.features import EmojiFeatures
from grafting.evaluation.metrics import balanced_accuracy
from grafting.families import family_of
from grafting.generation import generate
from grafting.loading import packaged_folder, pretraining_visits
from grafting.pipeline import Pipeline
from grafting.recipes import Recipe, load_recipe
from grafting.report import write_report
from grafting.runs import RunFolder
from grafting.runs.status import run_status
from grafting.synthesis import Synthesis, synthesize
from grafting.text_inputs import text_inputs
from grafting.training.compute import Compute

CPU = torch.device("cpu")
SHAPE = {
    "in_channels": 3, "out_channels": 6, "sample_size": 32, "patch_size": 8, "caption_channels": 384, "num_layers": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the layout of pixart-emoji: 2 blocks of width 32, 16 tokens."""
    folder = tmp_path_factory.mktemp("tiny") / "emoji"
    tiny_transformer(**SHAPE).save_pretrained(folder)
    return folder


# ---- what ships


def test_the_packaged_model_is_diffusers_own_bit_for_bit() -> None:
    from diffusers import PixArtTransformer2DModel

    model = load_model("pixart-emoji")
    own: Any = PixArtTransformer2DModel.from_pretrained(
        packaged_folder("pixart-emoji"), torch_dtype=torch.float32
    )
    cond = PackagedCaptions("emoji-held-out").conditions([0, 1, 2])
    x, t = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 500, 990])
    with torch.no_grad():
        wanted = own(
            x, encoder_hidden_states=cond.embeds.float(), encoder_attention_mask=cond.mask, timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
        )[0]  # fmt: skip
        found = family_of(model).predict(model, x, t, cond)
    assert torch.equal(found, wanted)
    assert sum(p.numel() for p in model.parameters()) < 6_000_000
    assert (len(model.transformer_blocks), model.config.sample_size // model.config.patch_size) == (12, 8)
    visits = json.loads((packaged_folder("pixart-emoji") / "pretraining.json").read_text())["image_visits"]
    assert pretraining_visits(model) == visits


def test_what_ships_is_small() -> None:
    files = [*packaged_folder("pixart-emoji").iterdir(), asset_path("emoji_classifier.safetensors")]
    assert sum(file.stat().st_size for file in files) < 15e6


def test_captions_go_round_the_groups_and_nothing_held_out_was_trained_on() -> None:
    train, held = PackagedCaptions("emoji-train"), PackagedCaptions("emoji-held-out")
    assert not set(train.captions) & set(held.captions)
    assert len(set(train.captions)) == len(train) <= 1500
    assert train.labels is not None
    assert held.labels is not None
    assert held.labels == [i % 9 for i in range(len(held))]
    assert train.labels[:18] == [*range(9), *range(9)]
    pairs = {
        name: group for c in (train, held) for name, group in zip(c.captions, c.labels or [], strict=True)
    }
    known = {"volcano": "Travel & Places", "cherry blossom": "Animals & Nature", "purse": "Objects"}
    assert {name: GROUPS[pairs[name]] for name in known} == known
    cond = train.conditions([0, 5, 0])
    assert cond.embeds.shape == (3, train.num_tokens, 384)
    assert torch.equal(cond.embeds[0], cond.embeds[2])
    assert not cond.embeds[cond.mask == 0].any()
    assert int(cond.null_mask.sum()) == 3 * len(train.null)
    assert torch.equal(cond.null_embeds[0, : len(train.null)], train.null)
    assert train.content_hash != held.content_hash


def test_the_classifier_states_its_accuracy() -> None:
    from safetensors import safe_open

    with safe_open(asset_path("emoji_classifier.safetensors"), framework="pt") as file:
        stated = file.metadata()
    assert float(stated["held_out_balanced_accuracy"]) > 0.55
    assert set(json.loads(stated["held_out_accuracy_by_group"])) == set(GROUPS)
    model, digest = load_emoji_classifier()
    features, logits = model(torch.zeros(2, 3, 32, 32))
    assert (features.shape, logits.shape, len(digest)) == ((2, 128), (2, 9), 64)
    with pytest.raises(CheckpointError, match=r"not an emoji classifier.*train_emoji_classifier"):
        load_emoji_classifier(asset_path("fashion_classifier.safetensors"))
    with pytest.raises(DataError, match=r"emoji features take uint8 \[N, 32, 32, 3\]"):
        EmojiFeatures().extract(np.zeros((2, 32, 32, 1), np.uint8))


# ---- alignment


def test_balanced_accuracy_of_given_predictions() -> None:
    # Of label 0 three of four are found, of label 1 none, of label 2 the only one: (3/4 + 0 + 1) / 3.
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    predicted = np.array([0, 0, 0, 2, 0, 2, 2])
    logits = np.eye(3, dtype=np.float32)[predicted]
    assert balanced_accuracy(logits, labels) == pytest.approx(1.75 / 3)
    assert balanced_accuracy(logits[:4], labels[:4]) == 0.75  # labels that do not occur do not count
    with pytest.raises(DataError, match=r"labels must be 0\.\.2"):
        balanced_accuracy(logits, labels + 1)


class Brightness:
    """A network whose class is the number in the first pixel."""

    name, weights_hash, num_label_classes, labels_are_prompts = "brightness", "0" * 64, 4, True

    def extract(self, images: np.ndarray, batch_size: int = 256, device: Any = "cpu") -> FeatureSet:
        pool = images[:, :2, :2].reshape(len(images), -1).astype(np.float32)
        return FeatureSet(pool, logits=np.eye(4, dtype=np.float32)[images[:, 0, 0, 0]])


def test_alignment_is_measured_over_the_groups_of_the_prompts() -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), dtype=np.uint8)
    images[:, 0, 0, 0] = [0, 0, 1, 1, 1, 2, 3, 0]
    labels = np.array([0, 0, 1, 1, 1, 1, 2, 2])
    file = SampleFile(images, labels, {"num_samples": 8})
    network: Any = Brightness()
    reference = Path(__file__).parent / "no.npz"
    with pytest.raises(DataError, match="no reference"):
        evaluate(file, reference, network)
    found = evaluate(file, _saved(images), network)
    assert found["metrics"]["alignment"] == pytest.approx((1 + 3 / 4 + 0) / 3)
    assert "label_accuracy" not in found["metrics"]
    assert found["protocol"]["alignment_by_chance"] == 0.25


def _saved(images: np.ndarray) -> Path:
    import tempfile

    from grafting.evaluation import write_samples

    path = Path(tempfile.mkdtemp()) / "reference.npz"
    write_samples(path, images, np.zeros(len(images), np.int64), {"num_samples": len(images)})
    return path


# ---- prompts without a text encoder


def test_pairs_by_packaged_captions(tiny: Path, tmp_path: Path) -> None:
    out, compute = tmp_path / "pairs", Compute(CPU, "fp32", 0, 1)
    settings = Synthesis(num=1003, steps=1, guidance=1.0, batch_size=250, shard_size=500, seed=3)
    synthesize(str(tiny), "emoji-train", out, settings, compute=compute)
    data, own = load_dataset(out), PackagedCaptions("emoji-train")
    assert isinstance(data, CaptionDataset)
    assert data.shape == (3, 32, 32)
    assert data.captions == [*own.captions, *own.captions[: 1003 - len(own)]]
    rows = [7, 1002]
    x, cond = data.batch(rows)
    wanted = own.conditions([row % len(own) for row in rows])
    assert all(torch.equal(a, b) for a, b in zip(cond, wanted, strict=True))
    noise = draws.normal(3, "synthesize/noise", torch.tensor(rows), (3, 32, 32))
    model = load_model(tiny)
    alone = sample(model, noise, wanted, steps=1, sampler="dpm++", guidance=1.0)
    assert (x - alone).abs().max() < 1e-3 * alone.abs().max()  # another batch: rounding, enlarged at t = 999
    assert data.captions[0] in (out / "quality.html").read_text()


def test_what_packaged_captions_do_not_fit_is_refused(tiny: Path, tmp_path: Path) -> None:
    compute = Compute(CPU, "fp32", 0, 1)
    narrow = tmp_path / "narrow"
    tiny_transformer(**{**SHAPE, "caption_channels": 16}).save_pretrained(narrow)
    with pytest.raises(DataError, match="captions of width 384; the model takes captions of width 16"):
        synthesize(str(narrow), "emoji-train", tmp_path / "a", Synthesis(num=2), compute=compute)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    with pytest.raises(CheckpointError, match=r"ships without a text encoder.*emoji-train or emoji-held-out"):
        synthesize("pixart-emoji", prompts, tmp_path / "b", Synthesis(num=2), compute=compute)
    with pytest.raises(CheckpointError, match="by a packaged name: emoji-train"):
        synthesize("pixart-emoji", "emoji-trian", tmp_path / "c", Synthesis(num=2), compute=compute)


def test_float16_captions_are_sampled_under_autocast(tiny: Path) -> None:
    model = load_model(tiny)
    cond: Caption = PackagedCaptions("emoji-train").conditions([0, 1])
    assert cond.embeds.dtype is torch.float16
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = sample(model, noise, cond, steps=1, sampler="ddim", guidance=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sample(model, noise, cond, steps=1, sampler="ddim", guidance=2.0)
    assert (exact - rounded).abs().mean() < 0.05 * exact.abs().mean()


def test_samples_by_packaged_captions_have_the_groups_as_labels(tiny: Path, tmp_path: Path) -> None:
    model, captions = text_inputs(load_model(tiny), prompts="emoji-held-out")
    assert captions is not None
    generate(model, tmp_path / "s.npz", num=11, steps=1, captions=captions)
    file = SampleFile.open(tmp_path / "s.npz")
    assert file.labels is not None
    assert file.labels.tolist() == [*range(9), 0, 1]
    assert file.protocol["labels"] == f"class of caption i mod {len(captions)}"
    lines = (tmp_path / "s.captions.jsonl").read_text().splitlines()
    assert [json.loads(line)["caption"] for line in lines] == captions.captions[:11]


# ---- the run


def quick(tiny: Path, **changes: Any) -> Recipe:
    stage = {
        "steps": 2,
        "batch_size": 6,
        "num_validation": 4,
        "warmup": 0,
        "checkpoint_every": 1,
        "precision": "fp32",
    }
    found = load_recipe("demo-text").to_dict()
    for name in ("distill", "finetune"):
        found[name] |= stage
    found["distill"] |= {"fit_samples": 8}
    found["finetune"] |= {"lora": {"rank": 2, "alpha": 2}}
    found["synthesize"] |= {"num": 40, "steps": 1, "batch_size": 10, "shard_size": 20, "precision": "fp32"}
    found["sample"] |= {"num": 20, "steps": 1, "batch_size": 10, "precision": "fp32"}
    return load_recipe({**found, "model": str(tiny), **changes})


def run(recipe: Recipe, path: Path, resume: bool = False) -> RunFolder:
    pipeline = Pipeline(recipe, RunFolder(path))
    pipeline.check()
    pipeline.run = RunFolder.create(path, recipe.to_dict(), Console(quiet=True), resume=resume)
    pipeline.all()
    return pipeline.run


def test_the_demo_on_a_tiny_model_and_after_a_kill(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(quick(tiny), tmp_path / "run")
    assert list(folder.read()["stages"]) == [
        "synthesize",
        "graft",
        "distill",
        "finetune",
        "sample",
        "evaluate",
    ]
    assert run_status(folder.path)["state"] == "finished"
    for name in ("teacher", "student", "reference"):
        assert len(SampleFile.open(folder.path / "samples" / f"{name}.npz")) == 20
    found = json.loads((folder.path / "evaluation.json").read_text())
    assert {"fd", "alignment"} <= set(found["comparison"]["metrics"])
    teacher = SampleFile.open(folder.path / "samples/teacher.npz")
    reference = SampleFile.open(folder.path / "samples/reference.npz")
    assert teacher.protocol["seed"] == 0
    assert reference.protocol["seed"] != 0
    assert found["teacher"]["protocol"]["reference"]["hash"] == reference.content_hash()
    page = write_report(folder.path).read_text()
    held = PackagedCaptions("emoji-held-out")
    assert all(f"<figcaption>{name}</figcaption>" in page for name in held.captions[:20])
    assert "Prompt alignment ratio" in page
    assert "The data are 40 pairs that the teacher sampled itself" in page
    assert "alignment by chance 0.1111" in page

    shard = RunFolder.progress

    class Killed(BaseException):
        pass

    def kill(self: RunFolder, stage: str, step: int, total: int, text: str) -> None:
        shard(self, stage, step, total, text)
        if stage == "synthesize" and text == "images" and step == 30:
            raise Killed

    monkeypatch.setattr(RunFolder, "progress", kill)
    with pytest.raises(Killed):
        run(quick(tiny), tmp_path / "cut")
    monkeypatch.setattr(RunFolder, "progress", shard)
    assert run_status(tmp_path / "cut")["stages_left"][0] == "synthesize"
    with pytest.raises(RunError, match="already holds a run"):
        run(quick(tiny), tmp_path / "cut")
    resumed = run(quick(tiny), tmp_path / "cut", resume=True)
    for name in ("student", "teacher"):
        one, other = (np.load(f.path / f"samples/{name}.npz")["arr_0"] for f in (folder, resumed))
        assert np.array_equal(one, other)


def test_recipes_with_synthesize_that_make_no_sense_are_refused(tiny: Path, tmp_path: Path) -> None:
    for data in ("samples", "../pairs", "a/b", ""):
        with pytest.raises(RunError, match="names a new folder in the run folder"):
            quick(tiny, data=data)
    made = quick(tiny, synthesize={"prompts": str(tmp_path / "no.txt")})
    with pytest.raises(DataError, match="no prompts file"):
        run(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()
