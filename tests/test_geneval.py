"""GenEval: the evaluator's layout, resuming, and its scores from a small results file counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from several import together

from grafting.errors import DataError, RunError
from grafting.evaluation.geneval import (
    TASKS,
    compare_scores,
    export_images,
    prompt_sampler,
    read_prompts,
    score,
)
from grafting.training.compute import make_compute

PROMPTS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats"},
]


class Painter:
    """Stands for a pipeline: an image whose colour is a function of its prompt and seed."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[int]]] = []

    def __call__(self, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        self.calls.append((prompts, seeds))
        return [
            Image.new("RGB", (4, 4), (len(p) % 256, s % 256, 0)) for p, s in zip(prompts, seeds, strict=True)
        ]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_the_layout_is_the_evaluators(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path / "prompts.jsonl", PROMPTS))
    out = export_images(Painter(), prompts, tmp_path / "out", num=3, batch_size=2)
    folders = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert folders == ["00000", "00001"]  # the evaluator reads folders whose names are digits
    for number, folder in enumerate(folders):
        assert json.loads((out / folder / "metadata.jsonl").read_text()) == PROMPTS[number]
        assert [p.name for p in sorted((out / folder / "samples").iterdir())] == [
            f"{j:05}.png" for j in range(3)
        ]


def test_seeds_depend_on_prompt_and_number_alone_and_drawn_images_stay(tmp_path: Path) -> None:
    once, twice = Painter(), Painter()
    export_images(once, PROMPTS, tmp_path / "a", num=3, batch_size=3)
    export_images(twice, PROMPTS, tmp_path / "b", num=3, batch_size=1)
    flat = [seed for painter in (once, twice) for _, seeds in painter.calls for seed in seeds]
    assert flat[:6] == flat[6:]
    assert len(set(flat[:6])) == 6
    (tmp_path / "a/00001/samples/00002.png").unlink()
    again = Painter()
    export_images(again, PROMPTS, tmp_path / "a", num=3, batch_size=3)
    assert again.calls == [(["a photo of two cats"], [flat[5]])]


def test_another_protocol_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    export_images(Painter(), PROMPTS, tmp_path / "out", num=1, describe={"steps": 20})
    with pytest.raises(RunError, match=r"another protocol \(different: num, steps\)"):
        export_images(Painter(), PROMPTS, tmp_path / "out", num=2, describe={"steps": 10})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(RunError, match="not an empty folder"):
        export_images(Painter(), PROMPTS, tmp_path / "mine")


def draw_share(out: Path) -> list[Any]:
    painter = Painter()
    seen: list[tuple[int, int]] = []
    export_images(
        painter, PROMPTS * 2, out, num=2, progress=lambda *at: seen.append(at),
        compute=make_compute(torch.device("cpu"), "fp32"),
    )  # fmt: skip
    return [painter.calls, seen]


def test_processes_share_the_prompts_and_the_first_waits_for_all_images(tmp_path: Path) -> None:
    alone = Painter()
    export_images(alone, PROMPTS * 2, tmp_path / "one", num=2)
    first, second = together(2, draw_share, tmp_path / "two")
    assert first[0] == alone.calls[0::2]
    assert second[0] == alone.calls[1::2]
    assert second[1] == [(1, 2), (2, 2)]
    assert first[1][-1] == (4, 4)  # the first is done when the others are
    files = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")}
    assert len(files) == 13
    for file in files:
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    first, second = together(2, draw_share, tmp_path / "mine")
    assert "not an empty folder" in first
    assert "PeerError" in second
    assert len(list((tmp_path / "mine").iterdir())) == 1


def test_the_vae_decodes_one_image_at_a_time_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16 that of SDXL overflows: images are black, and would be scored."""
    from pixart_tools import tiny_pipeline

    pipeline = tiny_pipeline().to(torch.float16)
    pipeline.vae.post_quant_conv.weight.data *= 1e3
    pipeline.vae.decoder.conv_in.weight.data *= 1e5  # values beyond 65504, which the last norm takes back
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    with torch.no_grad():
        assert not bool(torch.isfinite(pipeline.vae.decode(latents).sample).all())
    seen, decode = [], pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda z: (seen.append((len(z), z.dtype)), decode(z))[1])
    draw = prompt_sampler(pipeline, steps=2)
    images = draw(["the red cat"] * 3, [1, 2, 3])
    assert seen == [(1, torch.float32)] * 3
    assert pipeline.transformer.dtype == torch.float16
    assert all(np.asarray(image).std() > 1 for image in images)
    pipeline.vae.decoder.conv_out.bias.data[0] = float("inf")
    with pytest.raises(DataError, match="prompt 'sun': the image is not finite; leave out --dtype"):
        draw(["sun"], [1])
    pipeline.transformer.proj_out.bias.data[0] = float("nan")
    with pytest.raises(DataError, match="prompt 'sun': its latent is not finite"):
        draw(["sun"], [1])


def results(**correct: list[bool]) -> list[dict[str, Any]]:
    return [
        {"filename": "x", "tag": tag, "prompt": f"{tag} {i // 2}", "correct": right, "metadata": f"{tag} {i // 2}"}
        for tag, rights in correct.items() for i, right in enumerate(rights)
    ]  # fmt: skip


def test_the_overall_score_is_the_mean_of_the_tasks_not_of_the_images(tmp_path: Path) -> None:
    rows = results(counting=[True, False], single_object=[True, True, True, False, True, True, True, True])
    found = score(write(tmp_path / "r.jsonl", rows))
    assert list(found.tasks) == ["single_object", "counting"]  # the published order
    assert found.tasks == {"single_object": 7 / 8, "counting": 1 / 2}
    assert found.overall == pytest.approx((7 / 8 + 1 / 2) / 2)
    assert found.prompts == 5
    assert found.correct_prompts == 1.0
    assert found.to_dict()["overall"] == pytest.approx(68.75)


def test_two_results_are_compared_only_on_the_same_images(tmp_path: Path) -> None:
    teacher = score(write(tmp_path / "t.jsonl", results(**{task: [True, True] for task in TASKS})))
    student = score(write(tmp_path / "s.jsonl", results(**{task: [True, False] for task in TASKS})))
    found = compare_scores(student, teacher)
    assert found["overall"] == {"teacher": 100.0, "student": 50.0, "difference": -50.0}
    assert [row["difference"] for row in found["rows"]] == [-50.0] * 6
    other = score(write(tmp_path / "o.jsonl", results(counting=[True])))
    with pytest.raises(DataError, match="not of the same images"):
        compare_scores(other, teacher)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no"),
        ("nonsense", "line 1: not JSON"),
        ("[1]", "expected an object"),
        ('{"tag": "counting"}', "line 1"),
        ('\n{"tag": 3, "correct": true, "prompt": ""}', "line 2"),
        ("[" * 100_000, "line 1: not JSON"),
    ],
)
def test_other_files_are_refused_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text(text)
    for read in (score, read_prompts):
        with pytest.raises(DataError, match=message):
            read(path)
    with pytest.raises(DataError, match="can't read"):
        score(tmp_path / "absent.jsonl")


def test_images_of_a_pipeline_and_its_graft_through_the_command(
    tmp_path: Path, graft_command: Callable[..., str]
) -> None:
    from pixart_tools import save_tiny_pipeline

    import grafting
    from grafting import draws

    base = save_tiny_pipeline(tmp_path / "base")
    prompts = write(tmp_path / "prompts.jsonl", PROMPTS)
    size = ["--height", "16", "--width", "24", "--steps", "2", "--num", "2", "--prompts", str(prompts)]
    graft_command(
        "geneval", "export", str(base), "--out", str(tmp_path / "teacher"), "--batch-size", "2", *size
    )
    student = grafting.graft(
        grafting.load_model(base), grafting.GraftPlan([grafting.Replace("mha", [1], "hyena_x")])
    )
    grafting.save_graft(student, tmp_path / "graft")
    said = graft_command(
        "geneval", "export", str(tmp_path / "graft"), "--out", str(tmp_path / "student"), *size
    )
    assert said.strip() == f"images: {tmp_path / 'student'}"
    drawn = {
        who: [np.asarray(Image.open(p)) for p in sorted((tmp_path / who).glob("*/samples/*.png"))]
        for who in ("teacher", "student")
    }
    assert [len(images) for images in drawn.values()] == [4, 4]
    assert drawn["teacher"][0].shape == (16, 24, 3)
    for a, b in zip(drawn["teacher"], drawn["student"], strict=True):
        assert not np.array_equal(a, b)
    # The second image of the second prompt alone, by diffusers' own pipeline.
    pipeline = grafting.load_pipeline(base)
    pipeline.set_progress_bar_config(disable=True)
    alone = pipeline(
        PROMPTS[1]["prompt"], num_inference_steps=2, guidance_scale=4.5, height=16, width=24, clean_caption=False,
        generator=[torch.Generator().manual_seed(draws.torch_seed(0, "geneval/1/1"))], use_resolution_binning=False,
    ).images[0]  # fmt: skip
    assert np.abs(np.asarray(alone).astype(int) - drawn["teacher"][3]).max() <= 1


def test_the_score_command_prints_the_table(tmp_path: Path, graft_command: Callable[..., str]) -> None:
    teacher = write(tmp_path / "t.jsonl", results(counting=[True, True], single_object=[True] * 4))
    student = write(
        tmp_path / "s.jsonl", results(counting=[True, False], single_object=[True, True, True, False])
    )
    found = json.loads(graft_command("geneval", "score", str(student), "--json"))
    assert found["overall"] == 62.5
    assert [row["score"] for row in found["rows"]] == [75, 50]
    both = json.loads(graft_command("geneval", "score", str(student), "--against", str(teacher), "--json"))
    assert both["overall"] == {"teacher": 100.0, "student": 62.5, "difference": -37.5}
    table = graft_command("geneval", "score", str(student))
    assert "single_object" in table
    assert "62.5" in table
    with pytest.raises(AssertionError, match="can't read results"):
        graft_command("geneval", "score", str(tmp_path / "none"))
