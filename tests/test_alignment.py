"""Prompt alignment by CLIP: a tiny random CLIP in transformers' layout, and what it gives for images and captions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from grafting.errors import CheckpointError, DataError
from grafting.evaluation import write_samples
from grafting.evaluation.alignment import ClipScorer, evaluate_alignment

TEXTS = ["a red cat", "the blue moon", "a cat and a moon and a cat and a moon"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    letters = sorted(set("".join(TEXTS)) - {" "})
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    end = len(words) - 1
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {
        "vocab_size": len(words),
        "max_position_embeddings": 20,
        "eos_token_id": end,
        "bos_token_id": end - 1,
    }
    config = CLIPConfig(
        text_config={**size, **text, "pad_token_id": end},
        vision_config={**size, "image_size": 8, "patch_size": 4}, projection_dim=12,
    )  # fmt: skip
    torch.manual_seed(1)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def samples(path: Path, drawn: np.ndarray) -> Path:
    write_samples(path, drawn, np.arange(len(drawn)), {"num_samples": len(drawn), "steps": 2})
    lines = [json.dumps({"caption": TEXTS[i % 3]}) for i in range(len(drawn))]
    path.with_suffix(".captions.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_the_score_is_transformers_own_on_images_of_its_size(clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    drawn = images(5, 8, 8, 3)
    found = evaluate_alignment(samples(tmp_path / "s.npz", drawn), str(clip), batch_size=2)
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    pixels = (
        torch.from_numpy(drawn).permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]
    ) / torch.tensor(STD)[:, None, None]
    wanted = []
    for i in range(5):
        tokens = tokenizer([TEXTS[i % 3]], return_tensors="pt", truncation=True, max_length=20)
        with torch.no_grad():
            logits = model(**tokens, pixel_values=pixels[i : i + 1]).logits_per_image
        wanted.append(max(0.0, 100 * (logits / model.logit_scale.exp()).item()))
    assert any(score > 0 for score in wanted)
    assert found["metrics"]["clip_score"] == pytest.approx(sum(wanted) / 5, rel=1e-5)
    assert found["protocol"]["clip"]["name"] == "tiny-clip"
    assert found["protocol"]["captions_cut"] == 1  # the long caption, letter by letter
    assert (found["protocol"]["num_samples"], found["protocol"]["size"]) == (5, 8)


def test_other_sizes_are_resized_on_the_short_side_and_cropped(clip: Path) -> None:
    scorer = ClipScorer(str(clip))
    flat = np.full((1, 16, 48, 3), 51, dtype=np.uint8)
    pixels = scorer.pixels(flat)
    assert pixels.shape == (1, 3, 8, 8)
    wanted = (0.2 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(pixels, wanted[None, :, None, None].expand(1, 3, 8, 8))
    halves = np.zeros((1, 8, 24, 1), dtype=np.uint8)
    halves[:, :, 8:16] = 255  # what the crop leaves, and nothing of the borders
    one = scorer.pixels(halves) * scorer.std + scorer.mean
    torch.testing.assert_close(one, torch.ones_like(one))


def test_the_command_and_what_it_refuses(
    clip: Path, tmp_path: Path, graft_command: Callable[..., str]
) -> None:
    path = samples(tmp_path / "s.npz", images(3, 8, 8, 3))
    out = str(tmp_path / "a.json")
    found = json.loads(graft_command("evaluate", str(path), "--clip", str(clip), "--out", out, "--json"))
    assert set(found["metrics"]) == {"clip_score"}
    same = json.loads(graft_command("compare", out, out, "--json"))
    assert same["metrics"]["clip_score"]["ratio"] == 1
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a moon\n" * 3)
    other = json.loads(
        graft_command("evaluate", str(path), "--clip", str(clip), "--captions", str(prompts), "--json")
    )
    assert other["protocol"]["captions_sha256"] != found["protocol"]["captions_sha256"]
    with pytest.raises(AssertionError, match="exit 2: error: nothing to measure against"):
        graft_command("evaluate", str(path))
    prompts.write_text("a moon\n")
    with pytest.raises(DataError, match="1 captions for 3 images"):
        evaluate_alignment(path, str(clip), prompts)
    path.with_suffix(".captions.jsonl").unlink()
    with pytest.raises(DataError, match="no captions beside it"):
        evaluate_alignment(path, str(clip))
    with pytest.raises(CheckpointError, match="is no CLIP"):
        ClipScorer(str(tmp_path))
