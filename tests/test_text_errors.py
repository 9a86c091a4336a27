"""Errors of text-to-image work that say what to do: one line, exit status 2, before anything is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pixart_tools import save_tiny_pipeline

Command = Callable[..., str]

pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("errors") / "base")


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (None, [], r"no prompts file '.*prompts\.txt': expected a text file with one prompt a line, or JSON lines"),
        ("", [], "has no prompts; give one a line"),
        ("a cat\n\na dog\n", [], "line 2: the caption is empty; give a prompt, or take the line out"),
        ('{"prompt": "a cat"}\n{"name": "x"}\n', [], "line 2: no text under prompt or caption or text; it has name"),
        ("a cat\n" + "big " * 12, ["--max-tokens", 10], "line 2: 13 tokens, the model takes 10: .*give --truncate"),
        ("a cat\n" + "big " * 300, [], "line 2: 301 tokens, the model takes 300: .*give --truncate"),
        ("a cat\n", ["--height", 15], "height=15: the VAE makes 2x2 pixels of a latent; give a multiple of 4"),
        ("a cat\n", ["--width", 18], "width=18: 9 latents do not fit patches of 2x2; give a multiple of 4"),
    ],
)  # fmt: skip
def test_prompts_and_sizes(
    base: Path, tmp_path: Path, graft_command: Command, text: str | None, options: list[Any], said: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    if text is not None:
        prompts.write_text(text)
    with pytest.raises(AssertionError, match=f"^exit 2: error: .*{said}[^\n]*$"):
        graft_command(
            "synthesize",
            base,
            "--prompts",
            prompts,
            "--num",
            2,
            "--steps",
            1,
            "--out",
            tmp_path / "out",
            *options,
        )
    assert not list((tmp_path / "out").glob("latents-*")) if (tmp_path / "out").exists() else True


def test_what_is_no_pipeline(tmp_path: Path, graft_command: Command) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "folder").mkdir()
    expected = "is no text-to-image pipeline: expected a folder with model_index.json"
    given = ["--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out"]
    for source in (tmp_path / "folder", "arch:PixArt-Sigma-256"):
        with pytest.raises(AssertionError, match=f"^exit 2: error: .*{expected}[^\n]*$"):
            graft_command("synthesize", source, "--num", 1, *given)
        with pytest.raises(AssertionError, match=f"^exit 2: error: .*{expected}[^\n]*$"):
            graft_command(
                "geneval", "export", source, "--prompts", _geneval(tmp_path), "--out", tmp_path / "images"
            )
    with pytest.raises(
        AssertionError, match=r"exit 2: error: .*is no graft, run, saved model, or diffusers model"
    ):
        graft_command("export", tmp_path / "folder", "--format", "pipeline", "--out", tmp_path / "pipe")


def _geneval(folder: Path) -> Path:
    path = folder / "geneval.jsonl"
    path.write_text('{"tag": "counting", "prompt": "a photo of two cats"}\n')
    return path


def test_recipes_that_do_not_fit(base: Path, tmp_path: Path, graft_command: Command) -> None:
    recipe = tmp_path / "recipe.yaml"

    def run(model: Path, data: object, *options: object) -> str:
        recipe.write_text(
            f"model: {model}\ndata: {data}\nevaluate: null\nplan:\n"
            "- replace: {target: mha, layers: [1], with: hyena_x}\nfinetune: {lora: {rank: 2}}\n"
        )
        with pytest.raises(AssertionError) as failed:
            graft_command("run", recipe, "--out", tmp_path / "run", *options)
        said = str(failed.value)
        assert said.startswith("exit 2: error: ")
        assert "\n" not in said
        assert not (tmp_path / "run").exists()
        return said

    assert "rank 0 trains nothing: give at least 1 (64 for PixArt-Sigma)" in run(
        base, "fashion-10", "--set", "finetune.lora.rank=0"
    )
    assert "the model takes 4 channels" in run(base, "fashion-10")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    pairs = tmp_path / "pairs"
    graft_command(
        "synthesize", base, "--prompts", tmp_path / "prompts.txt", "--num", 1, "--steps", 1, "--out", pairs,
        "--height", 16, "--width", 20,
    )  # fmt: skip
    coarse = save_tiny_pipeline(tmp_path / "coarse", patch_size=4)
    said = run(coarse, pairs)
    assert "[4, 8, 10]" in said or "8x10" in said
    assert "multiples of" in said
