"""A transformer that stands alone, and the rest of its pipeline elsewhere: found, remembered, checked early."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pixart_tools import save_tiny_pipeline, tiny_pipeline, tiny_transformer

import grafting
from grafting import GraftPlan, Replace, loading
from grafting.data.prompts import CaptionTokenizer, EncodedPrompts, TextEncoder
from grafting.errors import CheckpointError, DataError, GraftError
from grafting.exports import export_model
from grafting.families import codec, family_of
from grafting.formats.pipeline_folder import (
    ALPHA,
    SIGMA,
    find_pipeline,
    fitting_class,
    home_of,
    transformer_config,
)
from grafting.pipeline import Pipeline
from grafting.recipes import load_recipe
from grafting.runs import RunFolder
from grafting.synthesis import Synthesis, synthesize
from grafting.text_inputs import text_inputs
from grafting.training.compute import make_compute

Command = Callable[..., str]
PLAN = GraftPlan([Replace("mha", [1], "hyena_x")])
SIGMA_2K = "PixArt-alpha/PixArt-Sigma-XL-2-2K-MS"
SIGMA_1024 = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"

pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("whole") / "pipeline")


@pytest.fixture(scope="module")
def alone(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of PixArt-Sigma's repositories at 512 and 2K: transformer/ and no more."""
    folder = tmp_path_factory.mktemp("alone") / "2K"
    shutil.copytree(whole / "transformer", folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def pairs(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "prompts.txt").write_text("a red cat\n")
    compute = make_compute(torch.device("cpu"), "fp32")
    synthesize(
        str(whole), folder / "prompts.txt", folder / "data", Synthesis(num=1, steps=1), compute=compute
    )
    return folder / "data"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red cat\nthe small blue dog under the moon\n")
    return path


def test_every_way_finds_the_rest_that_was_said(
    alone: Path, whole: Path, prompts: Path, tmp_path: Path, graft_command: Command
) -> None:
    pairs, few = tmp_path / "pairs", ("--num", 2, "--steps", 2)
    with pytest.raises(AssertionError, match=r"holds a transformer alone.*--pipeline"):
        graft_command("synthesize", alone, "--prompts", prompts, "--out", pairs, *few)
    graft_command("synthesize", alone, "--prompts", prompts, "--out", pairs, *few, "--pipeline", whole)
    same = tmp_path / "same"
    graft_command("synthesize", whole, "--prompts", prompts, "--out", same, *few)
    latents = "latents-00000.safetensors"
    assert (pairs / latents).read_bytes() == (same / latents).read_bytes()
    assert json.loads((pairs / "captions.json").read_text())["protocol"]["pipeline"] == str(whole)

    recipe = load_recipe({
        "model": str(alone), "pipeline": str(whole), "data": str(pairs), "evaluate": None, "finetune": None,
        "plan": PLAN.to_dict()["entries"], "sample": {"num": 2, "steps": 2, "prompts": str(prompts)},
        "distill": {"steps": 1, "batch_size": 2, "num_validation": 0, "fit_samples": 2, "precision": "fp32"},
    })  # fmt: skip
    run = Pipeline(recipe, RunFolder(tmp_path / "run"))
    run.check(to_the_end=True)
    run.run = RunFolder.create(tmp_path / "run", recipe.to_dict(), run.run.console)
    run.all()
    drawn = np.load(tmp_path / "run" / "samples" / "student.npz")["arr_0"]
    assert drawn.shape == (2, 16, 16, 3)

    # The graft remembers it: later verbs are told nothing.
    graft_command("sample", tmp_path / "run", "--prompts", prompts, *few, "--guidance", 1.5,
                  "--out", tmp_path / "again.npz")  # fmt: skip
    assert np.array_equal(np.load(tmp_path / "again.npz")["arr_0"], drawn)
    assert grafting.load_pipeline(tmp_path / "run").vae.config.scaling_factor == 0.5
    graft_command("export", tmp_path / "run", "--format", "pipeline", "--out", tmp_path / "exported")
    assert (tmp_path / "exported" / "text_encoder" / "model.safetensors").is_file()
    assert str(whole) not in "".join(path.read_text() for path in (tmp_path / "exported").rglob("*.json"))
    again = grafting.load_model(tmp_path / "exported")
    assert home_of(again) == tmp_path / "exported"
    with pytest.raises(GraftError, match="or its pipeline is one"):
        grafting.push_to_hub(tmp_path / "run" / "graft", "me/graft", api=object())
    graft = str(tmp_path / "run" / "graft")
    with pytest.raises(GraftError, match="no place for a pipeline"):
        export_model(graft, tmp_path / "x.pt", "published", pipeline=str(whole))


def test_a_graft_without_a_pipeline_can_be_told_of_one(alone: Path, whole: Path, tmp_path: Path) -> None:
    student = grafting.graft(grafting.load_model(alone), PLAN)
    grafting.save_graft(student, tmp_path / "graft")
    with pytest.raises(CheckpointError, match="holds a transformer alone"):
        grafting.load_pipeline(tmp_path / "graft")
    with pytest.raises(CheckpointError, match="holds a transformer alone"):
        grafting.save_pipeline(student, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    grafting.save_pipeline(student, tmp_path / "out", pipeline=whole)
    told = grafting.load_model(tmp_path / "graft", pipeline=whole)
    grafting.save_graft(told, tmp_path / "told")
    assert home_of(grafting.load_model(tmp_path / "told")) == whole
    assert find_pipeline(tmp_path / "told") == whole


def test_a_pixart_without_a_vae_is_refused_before_any_work(
    alone: Path, whole: Path, pairs: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr(codec, "load_vae", lambda source=None, device="cpu": asked.append(source))
    with pytest.raises(CheckpointError, match=r"no VAE for the samples.*--pipeline.*sample\.vae"):
        codec.decoder(grafting.load_model(alone))
    with pytest.raises(CheckpointError, match="does not say which pipeline"):
        codec.decoder(tiny_transformer())
    assert asked == []
    monkeypatch.undo()

    def check(**changes: Any) -> None:
        recipe = load_recipe({
            "model": str(alone), "data": str(pairs), "plan": PLAN.to_dict()["entries"], "distill": None,
            "finetune": None, "evaluate": None, **changes,
        })  # fmt: skip
        Pipeline(recipe, RunFolder(tmp_path / "run")).check(to_the_end=True)

    with pytest.raises(CheckpointError, match="holds a transformer alone"):
        check()
    with pytest.raises(
        CheckpointError, match="holds a transformer alone"
    ):  # the VAE is known, the text encoder not
        check(sample={"prompts": str(prompts), "vae": str(whole)})
    check(sample={"vae": str(whole)})
    (tmp_path / "long.txt").write_text("a red cat\n" + "cat " * 400)
    sample = {"prompts": str(tmp_path / "long.txt"), "num": 2}
    with pytest.raises(DataError, match=r"line 2: 401 tokens, the model takes 300.*truncate: true"):
        check(sample=sample, pipeline=str(whole))
    with pytest.raises(DataError, match="line 2: 401 tokens"):
        check(synthesize={"prompts": sample["prompts"], "num": 2}, data="pairs", pipeline=str(whole))
    check(sample=sample | {"num": 1}, pipeline=str(whole))  # the second is not drawn
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    (broken / "text_encoder" / "model.safetensors").unlink()
    check(sample=sample | {"truncate": True}, pipeline=str(broken))  # no weights of the text encoder are read
    shutil.rmtree(broken / "text_encoder")
    with pytest.raises(CheckpointError, match="has no text_encoder"):
        check(sample={"prompts": str(prompts)}, pipeline=str(broken))


def test_a_hub_id_gives_what_is_wanted_and_known_ones_their_rest(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, patterns: list[str]) -> Path:
        asked.append((name, patterns))
        return whole if name == SIGMA_1024 else tmp_path

    monkeypatch.setattr(loading, "download", download)
    assert find_pipeline(SIGMA_2K, ("vae",)) == whole
    model = tiny_transformer()
    grafting.surgery.set_source(model, SIGMA_2K)
    assert codec.image_shape(model) == (16, 16, 3)
    assert [name for name, _ in asked] == [SIGMA_1024] * 2
    for _, patterns in asked:
        assert "vae/*.safetensors" in patterns
        assert not any("text_encoder" in pattern or pattern.startswith("*") for pattern in patterns)
    find_pipeline(SIGMA_2K, ("tokenizer",))
    assert "text_encoder/config.json" in asked[-1][1]
    assert "text_encoder/*.safetensors" not in asked[-1][1]
    find_pipeline(SIGMA_2K)
    assert {"text_encoder/*.safetensors", "vae/*.json", "scheduler/*"} <= set(asked[-1][1])
    assert not any(pattern.startswith("transformer/") and "json" not in pattern for pattern in asked[-1][1])
    with pytest.raises(
        CheckpointError, match=r"the hub's 'some/transformer' has no model_index\.json.*--pipeline"
    ):
        find_pipeline("some/transformer")


def test_every_process_resolves_the_pipeline_itself(
    alone: Path, whole: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[Any] = []
    monkeypatch.setattr("grafting.pipeline.image_shape", lambda *given: shapes.append(given) or (16, 16, 3))
    recipe = load_recipe({
        "model": str(alone), "pipeline": str(whole), "data": str(pairs), "plan": PLAN.to_dict()["entries"],
        "distill": None, "finetune": None, "evaluate": None,
    })  # fmt: skip
    second = Pipeline(recipe, RunFolder(tmp_path / "run"))
    second.compute = SimpleNamespace(is_main=False)  # type: ignore[assignment]
    second.check(to_the_end=True)
    assert len(shapes) == 1


def test_the_vae_of_a_whole_pipeline_by_hub_id(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderKL

    original = AutoencoderKL.from_pretrained

    def from_hub(name: str, subfolder: str | None = None, **given: Any) -> Any:
        if name == "some/pipeline" and subfolder == "vae":
            return original(whole / "vae", **given)
        raise OSError(f"{name} has no config.json")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", from_hub)
    assert codec.load_vae("some/pipeline").config.scaling_factor == 0.5
    with pytest.raises(
        GraftError, match=r"can't load the VAE 'other/thing': other/thing has no config\.json"
    ):
        codec.load_vae("other/thing")


# ---- Sigma or Alpha


def test_the_class_follows_the_transformer() -> None:
    sigma = {"256": (32, 0.5), "512": (64, 1), "1024": (128, 2), "2K": (256, 4)}
    for side, scale in sigma.values():
        config = {"sample_size": side, "interpolation_scale": scale, "use_additional_conditions": False}
        assert fitting_class(ALPHA, config) == SIGMA
    for config in ({"sample_size": 128}, {"sample_size": 128, "use_additional_conditions": True}):
        assert fitting_class(SIGMA, config) == ALPHA
    for unclear in ({}, {"sample_size": 64}, {"sample_size": 32, "interpolation_scale": 1}):
        assert fitting_class(ALPHA, unclear) == ALPHA
        assert fitting_class(SIGMA, unclear) == SIGMA
    assert fitting_class(ALPHA, {"sample_size": 32, "interpolation_scale": 0.5}) == SIGMA


def test_an_index_of_the_other_pixart_does_not_count(
    whole: Path, alone: Path, prompts: Path, tmp_path: Path
) -> None:
    from diffusers import PixArtSigmaPipeline

    rest = tmp_path / "rest"
    shutil.copytree(whole, rest)
    index = json.loads((rest / "model_index.json").read_text())
    (rest / "model_index.json").write_text(json.dumps({**index, "_class_name": ALPHA}))
    config = transformer_config(alone)
    assert config["use_additional_conditions"] is False
    assert CaptionTokenizer(rest, config).max_tokens == 300
    assert CaptionTokenizer(rest, {}).max_tokens == 120
    assert CaptionTokenizer(whole, {"sample_size": 128}).max_tokens == 120
    assert type(grafting.load_pipeline(alone, rest)) is PixArtSigmaPipeline
    student = grafting.graft(grafting.load_model(alone, pipeline=rest), PLAN)
    grafting.save_pipeline(student, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["_class_name"] == SIGMA
    for source in (tmp_path / "saved", tmp_path / "saved" / "transformer"):
        assert transformer_config(source)["sample_size"] == 8
    compute = make_compute(torch.device("cpu"), "fp32")
    synthesize(
        str(alone),
        prompts,
        tmp_path / "pairs",
        Synthesis(num=1, steps=1),
        compute=compute,
        pipeline=str(rest),
    )
    assert grafting.data.load_dataset(tmp_path / "pairs").num_tokens == 300
    _, captions = text_inputs(grafting.load_model(alone, pipeline=rest), prompts=prompts)
    assert captions is not None
    assert captions.conditions([0]).embeds.shape == (1, 300, 16)


# ---- prompts in memory


def test_prompts_are_held_without_padding_in_the_encoders_type(whole: Path, prompts: Path) -> None:
    config = transformer_config(whole)
    held = EncodedPrompts(prompts, whole, config, dtype=torch.bfloat16, batch_size=1)
    lengths = [4, 8]  # of words, and the end
    assert held.held["embeds"].shape == (sum(lengths), 16)
    assert held.held["embeds"].dtype == torch.bfloat16
    assert held.held["offsets"].tolist() == [0, 4, 12]
    encoder = TextEncoder(whole, config, dtype=torch.bfloat16)
    cond = held.conditions([1, 0, 1])
    for row, number in enumerate([1, 0, 1]):
        embeds, mask = encoder.encode([held.captions[number]])
        assert torch.equal(cond.mask[row].long(), mask[0])
        assert torch.equal(cond.embeds[row], embeds[0] * mask[0][:, None])
    embeds, mask = encoder.encode([""])
    assert torch.equal(cond.null_mask.long(), mask.expand(3, -1))
    assert torch.equal(cond.null_embeds, (embeds * mask[..., None]).expand(3, -1, -1))


def test_too_long_prompts_are_cut_on_demand(whole: Path, tmp_path: Path, graft_command: Command) -> None:
    (tmp_path / "long.txt").write_text("cat " * 400)
    given = (
        "sample",
        whole,
        "--prompts",
        tmp_path / "long.txt",
        "--num",
        1,
        "--steps",
        1,
        "--out",
        tmp_path / "a.npz",
    )
    with pytest.raises(AssertionError, match=r"line 1: 401 tokens.*--truncate"):
        graft_command(*given)
    graft_command(*given, "--truncate")
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (1, 16, 16, 3)


# ---- fp16


def test_weights_of_the_variant_fp16_are_read_where_there_are_no_others(tmp_path: Path) -> None:
    own = tiny_pipeline()
    for part in (own.transformer, own.text_encoder, own.vae):
        part.to(torch.float16)
    own.save_pretrained(tmp_path / "half", variant="fp16")
    own.transformer.save_pretrained(tmp_path / "half" / "transformer", variant="fp16", max_shard_size="40KB")
    (tmp_path / "half" / "transformer" / "diffusion_pytorch_model.fp16.safetensors").unlink(missing_ok=True)
    assert list((tmp_path / "half" / "transformer").glob("*.index.fp16.json"))
    model = grafting.load_model(tmp_path / "half")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, own.transformer.state_dict()[name].float()), name
    encoder = TextEncoder(tmp_path / "half", transformer_config(tmp_path / "half"))
    assert encoder.model.dtype == torch.float32
    assert codec.image_shape(model) == (16, 16, 3)
    assert codec.load_vae(str(tmp_path / "half")).dtype == torch.float32
    pipeline = grafting.load_pipeline(tmp_path / "half")
    assert (pipeline.vae.dtype, pipeline.text_encoder.dtype) == (torch.float32, torch.float32)
    assert family_of(pipeline.transformer).name == "pixart"
