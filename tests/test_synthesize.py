"""Synthetic pairs: equal to diffusers' pipeline, the same bytes however they are made, and errors that teach."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from pixart_tools import save_tiny_pipeline, tiny_pipeline
from several import together

import grafting
from grafting import draws, processes
from grafting.data import load_dataset
from grafting.data.prompts import read_prompts
from grafting.data.text import CaptionDataset, pack_captions, unpack_captions
from grafting.errors import CheckpointError, DataError, GraftError, RunError
from grafting.synthesis import Synthesis, synthesize
from grafting.training.compute import Compute, make_compute

PROMPTS = ["the red cat", "a small <b>house</b> under the blue moon", "green sun"]
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"num": 7, "steps": 2, "batch_size": 2, "shard_size": 3, "seed": 4}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("pixart") / "pipeline")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def make(pipeline: Path, prompts: Path, out: Path, rank: int = 0, world: int = 1, **changes: Any) -> Path:
    options = {key: changes.pop(key) for key in ("resume", "progress", "dtype") if key in changes}
    settings = Synthesis(**{**SMALL, **changes})
    return synthesize(
        str(pipeline), prompts, out, settings, compute=Compute(CPU, "fp32", rank, world), **options
    )


@pytest.fixture(scope="module")
def pairs(pipeline: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pairs") / "data"
    make(pipeline, prompts, out)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_pairs_are_those_of_the_pipeline_bit_for_bit(pairs: Path) -> None:
    data = load_dataset(pairs)
    assert isinstance(data, CaptionDataset)
    assert (len(data), data.shape, data.num_classes, data.caption_width) == (7, (4, 8, 8), 0, 16)
    assert data.captions == [*PROMPTS, *PROMPTS, PROMPTS[0]]
    x, cond = data.batch([2, 0])
    own = tiny_pipeline()
    noise = draws.normal(4, "synthesize/noise", torch.tensor([0, 1]), (4, 8, 8))
    wanted = own(
        PROMPTS[:2], latents=noise, output_type="latent", use_resolution_binning=False, height=16, width=16,
        num_inference_steps=2, guidance_scale=4.5, clean_caption=False,
    ).images  # fmt: skip
    assert torch.equal(data.batch([0, 1])[0], wanted)
    with torch.no_grad():
        embeds, mask, null_embeds, null_mask = own.encode_prompt([PROMPTS[2], PROMPTS[0]], device="cpu")
    assert torch.equal(cond.mask.long(), mask)
    assert torch.equal(cond.null_mask.long(), null_mask)
    torch.testing.assert_close(cond.embeds, embeds * mask[..., None])
    torch.testing.assert_close(cond.null_embeds, null_embeds * null_mask[..., None])
    assert not torch.equal(x[0], x[1])


def test_a_stop_anywhere_and_any_number_of_processes_give_the_same_bytes(
    pipeline: Path, prompts: Path, pairs: Path, tmp_path: Path
) -> None:
    wanted = contents(pairs)

    class Killed(BaseException):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if what == "images" and done >= 5:
            raise Killed

    with pytest.raises(Killed):
        make(pipeline, prompts, tmp_path / "stopped", progress=kill)
    assert (tmp_path / "stopped" / "latents-00000.safetensors").is_file()
    assert not (tmp_path / "stopped" / "latents-00001.safetensors").exists()
    with pytest.raises(DataError, match="not finished: go on with the same `graft synthesize` and --resume"):
        load_dataset(tmp_path / "stopped")
    with pytest.raises(RunError, match="begun already; go on with --resume"):
        make(pipeline, prompts, tmp_path / "stopped")
    with pytest.raises(RunError, match=r"other arguments \(different: steps\)"):
        make(pipeline, prompts, tmp_path / "stopped", resume=True, steps=3)
    make(pipeline, prompts, tmp_path / "stopped", resume=True)
    assert contents(tmp_path / "stopped") == wanted | {
        "quality.html": (tmp_path / "stopped" / "quality.html").read_bytes()
    }


def made_by_two(pipeline: Path, prompts: Path, out: Path, seconds: float) -> list[str]:
    """Each its share, the second slowly, where collectives wait for less than a shard takes; what the first says."""
    compute = make_compute(CPU, "fp32")
    processes.control()._get_backend(CPU)._set_default_timeout(timedelta(seconds=3))
    said = []

    def progress(what: str, done: int, total: int) -> None:
        said.append(f"{what} {done}/{total}")
        if what == "images" and not compute.is_main:
            time.sleep(seconds / total)

    make(pipeline, prompts, out, compute.rank, compute.world, progress=progress)
    compute.wait()  # as a stage of a run ends
    load_dataset(out)  # which all processes then train on
    return said


def test_the_first_of_several_waits_for_the_shards_of_the_others(
    pipeline: Path, prompts: Path, pairs: Path, tmp_path: Path
) -> None:
    first, second = together(2, made_by_two, pipeline, prompts, tmp_path / "two", 4.5)
    assert "shards 2/3" in first
    assert second[-1] == "images 3/3"
    wanted = contents(pairs)
    for name, content in contents(tmp_path / "two").items():
        if name != "quality.html":
            assert content == wanted[name], name


def test_autocast_leaves_the_ends_of_the_model_in_float32(
    pipeline: Path, prompts: Path, tmp_path: Path, graft_command: Callable[..., str]
) -> None:
    """--precision bf16, the documented way of speed, against --dtype bfloat16, which rounds the ends, too."""
    found = {}
    for name, options in (
        ("exact", []), ("autocast", ["--precision", "bf16"]), ("cast", ["--dtype", "bfloat16"]),
    ):  # fmt: skip
        out = tmp_path / name
        graft_command(
            "synthesize", pipeline, "--prompts", prompts, "--num", 6, "--steps", 3, "--out", out, *options
        )
        found[name] = load_dataset(out).batch(range(6))[0]
    error = {name: float((x - found["exact"]).square().mean()) for name, x in found.items()}
    assert 0 < error["autocast"] < error["cast"] / 2, error
    assert json.loads((tmp_path / "autocast/captions.json").read_text())["protocol"]["precision"] == "bf16"
    assert json.loads((tmp_path / "exact/captions.json").read_text())["protocol"]["precision"] == "fp32"
    again = ["synthesize", pipeline, "--prompts", prompts, "--num", 6, "--steps", 3, "--resume", "--out"]
    with pytest.raises(AssertionError, match="different: precision"):
        graft_command(*again, tmp_path / "autocast")
    with pytest.raises(AssertionError, match="different: precision"):
        graft_command(*again, tmp_path / "exact", "--precision", "bf16")
    with pytest.raises(AssertionError, match="precision 'half': expected auto, fp32 or bf16"):
        graft_command(*again, tmp_path / "exact", "--precision", "half")


def test_a_part_is_a_part_and_damage_is_found(pairs: Path, tmp_path: Path) -> None:
    data = load_dataset(pairs)
    train, validation = data.split(2, seed=1)
    assert (len(train), len(validation)) == (5, 2)
    assert sorted([*train.rows.tolist(), *validation.rows.tolist()]) == list(range(7))  # type: ignore[union-attr]
    assert torch.equal(validation.batch([1])[0], data.batch([int(validation.rows[1])])[0])  # type: ignore[union-attr]
    assert train.content_hash != validation.content_hash != data.content_hash
    assert len(data.subset(0.5, seed=0)) == 4
    for bad in (0, 7):
        with pytest.raises(DataError, match="hold out"):
            data.split(bad)
    with pytest.raises(DataError, match=r"outside 0\.\.6"):
        data.batch([7])
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in contents(pairs).items():
        (copy / name).write_bytes(content)
    damaged = copy / "latents-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    again = load_dataset(copy)
    again.batch([0, 1, 2])
    with pytest.raises(DataError, match=r"latents-00001.safetensors is damaged"):
        again.batch([3])
    damaged.unlink()
    with pytest.raises(DataError, match="has lost latents-00001"):
        load_dataset(copy)
    manifest = json.loads((copy / "captions.json").read_text())
    (copy / "captions.json").write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(DataError, match="version 1"):
        load_dataset(copy)


def test_captions_come_back_from_their_packed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(3, 6, 4, generator=generator)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 0]])  # the last has gaps
    packed = pack_captions(embeds, mask)
    assert packed["offsets"].tolist() == [0, 2, 8, 12]
    found, found_mask = unpack_captions(packed, [2, 0], 6, packed["offsets"])
    assert torch.equal(found_mask.long(), mask[[2, 0]])
    used = mask[[2, 0]].bool()
    assert torch.equal(found[used], embeds[[2, 0]][used])


def test_other_sizes_and_the_quality_page(pipeline: Path, prompts: Path, tmp_path: Path) -> None:
    page = make(pipeline, prompts, tmp_path / "wide", num=2, height=16, width=24).read_text()
    assert load_dataset(tmp_path / "wide").shape == (4, 8, 12)
    assert "&lt;b&gt;house&lt;/b&gt;" in page
    assert "<b>house" not in page
    assert page.count("<img") == 2
    assert "2 different prompts" in page
    for size, said in (
        ({"height": 15}, "the VAE makes 2x2 pixels of a latent"), ({"width": 18}, "patches of 2x2"),
    ):  # fmt: skip
        with pytest.raises(GraftError, match=said):
            make(pipeline, prompts, tmp_path / f"bad{size}", num=1, **size)


def test_prompt_files(tmp_path: Path) -> None:
    def read(name: str, text: str) -> list[str]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return [prompt.text for prompt in read_prompts(tmp_path / name)]

    assert read("a.txt", "\ufeffone\r\n two \n\n\n") == ["one", "two"]
    lines = '{"caption": "a {cat}"}\n{"id": 3, "prompt": "ein \\"Haus\\""}\n'
    assert read("a.jsonl", lines) == read("b.txt", lines) == ["a {cat}", 'ein "Haus"']
    for name, text, said in (
        ("e.txt", "one\n\ntwo", r"e\.txt, line 2: the caption is empty"),
        ("e.txt", "\n\n", "has no prompts"),
        ("e.jsonl", '{"prompt": "a"}\n{"prompt": " "}', "line 2: the caption is empty"),
        ("e.jsonl", '{"prompt": "a"}\nb', "line 2: not a JSON object"),
        ("e.jsonl", "[1]", "line 1: a JSON list"),
        ("e.jsonl", '{"words": "a"}', "line 1: no text under prompt or caption or text; it has words"),
        ("e.jsonl", '{"prompt": 3}', "line 1: no text"),
    ):
        with pytest.raises(DataError, match=said):
            read(name, text)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="no UTF-8 text"):
        read_prompts(tmp_path / "binary")
    with pytest.raises(DataError, match="no prompts file"):
        read_prompts(tmp_path / "none.txt")


def test_what_cannot_be_made_is_said_before_it_begins(pipeline: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("a cat\n" + "big " * 20 + "\n")
    with pytest.raises(DataError, match=r"long\.txt, line 2: 21 tokens, the model takes 10: .*--truncate"):
        make(pipeline, long, tmp_path / "refused", num=2, max_tokens=10)
    make(pipeline, long, tmp_path / "cut", num=2, max_tokens=10, truncate=True)
    _, cond = load_dataset(tmp_path / "cut").batch([0, 1])
    assert cond.mask.sum(dim=1).tolist() == [3, 10]
    for source, said in (
        (str(tmp_path), "no text-to-image pipeline: expected a folder with model_index.json"),
        ("arch:PixArt-Sigma-256", "no text-to-image pipeline"),
    ):
        with pytest.raises(CheckpointError, match=said):
            synthesize(source, long, tmp_path / "x", Synthesis(num=1), compute=Compute(CPU, "fp32"))
    with pytest.raises(GraftError, match="guidance=nan"):
        Synthesis(num=1, guidance=float("nan"))
    other = save_tiny_pipeline(tmp_path / "other")
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"linear"', '"scaled_linear"'))
    with pytest.raises(CheckpointError, match="beta_schedule is 'scaled_linear'"):
        make(other, long, tmp_path / "y")
    index = other / "model_index.json"
    index.write_text(index.read_text().replace("PixArtSigmaPipeline", "FluxPipeline"))
    config.unlink()
    with pytest.raises(CheckpointError, match="'FluxPipeline'; known are PixArtSigmaPipeline"):
        make(other, long, tmp_path / "z")


def test_both_stages_learn_from_pairs(pipeline: Path, pairs: Path) -> None:
    """At the pairs' own size, with captions of different lengths and the empty caption for dropped ones."""
    teacher = grafting.load_model(pipeline)
    student = grafting.graft(teacher, grafting.GraftPlan([grafting.Replace("mha", [1, 3], "hyena_x")]))
    data = load_dataset(pairs)
    settings = {"batch_size": 4, "num_validation": 0, "label_dropout": 0.5, "precision": "fp32"}
    result = grafting.distill(student, teacher, data, {**settings, "steps": 12, "fit_samples": 7, "lr": 3e-3})
    for path, error in result.final_error.items():
        assert error < result.start_error["copied"][path]
    before = [p.clone() for p in student.parameters()]
    done = grafting.finetune(
        student, data, {**settings, "steps": 3, "objectives": {"diffusion": 1, "features": 1}}, teacher
    )
    assert done.trained_params == sum(p.numel() for p in student.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()
