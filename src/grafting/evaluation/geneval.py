"""GenEval (arXiv 2310.11513): images of its prompts in the layout that its evaluator reads, and a table of its results.

The evaluator itself (an object detector and CLIP) is not part of this package. `export_images` writes what it reads,

    OUT/00000/metadata.jsonl  OUT/00000/samples/00000.png  ...

and `score` reads the JSON lines that it writes, one object an image: "tag" (the task), "correct", "prompt", "metadata".
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grafting import draws
from grafting.errors import CheckpointError, DataError, RunError
from grafting.formats import weights

if TYPE_CHECKING:
    from grafting.training.compute import Compute

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
PROMPTS_URL = (
    "https://raw.githubusercontent.com/djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f"
    "/prompts/evaluation_metadata.jsonl"
)
PROMPTS_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"  # 553 prompts
MAX_BYTES = 256 << 20
SHARE_SECONDS = 2.0  # between looks for the images of other processes

Draw = Callable[[list[str], list[int]], Sequence[Any]]
"""(prompts, one torch seed each) -> as many PIL images."""


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The prompts of a JSON-lines file, each an object with "tag", "prompt" and what the evaluator needs.

    Raises DataError that names the line.
    """
    prompts = []
    for number, found in _json_lines(Path(path), "prompts"):
        for key in ("prompt", "tag"):
            if not isinstance(found.get(key), str) or not found[key].strip():
                raise DataError(
                    f"{str(path)!r}, line {number}: key {key!r} is missing or empty; GenEval's prompts "
                    'are JSON lines such as {"tag": "counting", "prompt": "a photo of two cats", "include": [...]}'
                )
        prompts.append(found)
    if not prompts:
        raise DataError(f"{str(path)!r} holds no prompts")
    return prompts


def fetch_prompts(path: Path) -> Path:
    """Download GenEval's 553 prompts to `path`, checked by hash; nothing is done if they are there.

    Raises DataError without a network, or when what came is something else.
    """
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == PROMPTS_SHA256:
        return path
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(PROMPTS_URL, timeout=30) as answer:
            content = answer.read(MAX_BYTES)
    except (URLError, OSError, ValueError) as error:
        raise DataError(
            f"can't fetch GenEval's prompts ({error}); download {PROMPTS_URL} and give it as --prompts"
        ) from None
    if hashlib.sha256(content).hexdigest() != PROMPTS_SHA256:
        raise DataError(
            f"{PROMPTS_URL} is not the file that was expected (sha256); give a file you trust as --prompts"
        )
    weights.write_bytes(path, content)
    return path


def prompt_sampler(
    pipeline: Any, *, steps: int = 20, guidance: float = 4.5, height: int | None = None, width: int | None = None
) -> Draw:  # fmt: skip
    """A text-to-image pipeline of diffusers as a function of prompts and seeds; each image has its own generator.

    Captions are lowered and stripped and not cleaned of markup, as in `graft synthesize`. Latents are decoded one at a
    time by the pipeline's VAE, which is put into float32: in float16 that of SDXL, which PixArt-Sigma has, overflows.
    The function raises DataError for an image that is not finite.
    """
    import torch

    from grafting.families.codec import move_vae, scaling_of

    move_vae(pipeline.vae, pipeline.vae.device, torch.float32)
    scaling, shift = scaling_of(pipeline.vae)

    @torch.no_grad()
    def draw(prompts: list[str], seeds: list[int]) -> Sequence[Any]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        latents = pipeline(
            prompts, num_inference_steps=steps, guidance_scale=guidance, height=height, width=width,
            generator=generators, use_resolution_binning=False, clean_caption=False, output_type="latent",
        ).images  # fmt: skip
        images = []
        for prompt, one in zip(prompts, latents.float().split(1), strict=True):
            pixels = pipeline.vae.decode(one / scaling + shift).sample
            if not bool(torch.isfinite(pixels).all()):  # as an image it would be black, and be scored
                where = "the image is" if bool(torch.isfinite(one).all()) else "its latent is"
                raise DataError(
                    f"prompt {prompt[:80]!r}: {where} not finite; leave out --dtype, or give bfloat16"
                )
            images += pipeline.image_processor.postprocess(pixels.cpu())
        return images

    return draw


def export_images(
    draw: Draw, prompts: Sequence[dict[str, Any]], out: str | Path, *, num: int = 4, batch_size: int = 4,
    seed: int = 0, describe: dict[str, Any] | None = None, progress: Callable[[int, int], None] | None = None,
    compute: Compute | None = None,
) -> Path:  # fmt: skip
    """Draw `num` images of every prompt into GenEval's layout under `out`; images that are there are not drawn again.

    The noise of image j of prompt i depends on (seed, i, j) alone. `describe` is kept in OUT/protocol.json; a folder of
    another protocol is refused. compute: this process among several, each of which draws the prompts of its share; the
    first ends when all images are there. Raises RunError.
    """
    if num < 1 or batch_size < 1:
        raise RunError(f"num={num}, batch_size={batch_size}: both are at least 1")
    out = Path(out)
    digest = hashlib.sha256(json.dumps(list(prompts), sort_keys=True).encode()).hexdigest()
    protocol = {
        "num": num,
        "seed": seed,
        "prompts": len(prompts),
        "prompts_sha256": digest,
        **(describe or {}),
    }
    is_main, world = compute is None or compute.is_main, compute.world if compute else 1
    if is_main:
        _agree(out, json.loads(json.dumps(protocol)))
    if compute:
        compute.wait()  # nobody draws into a folder that is refused
    numbers = range(len(prompts))
    mine = compute.mine(numbers) if compute else numbers
    for done, index in enumerate(mine):
        metadata, folder = prompts[index], out / f"{index:05}"
        if not (folder / "metadata.jsonl").is_file():
            weights.write_bytes(folder / "metadata.jsonl", json.dumps(metadata).encode())
        files = _images(out, index, num)
        missing = [j for j in range(num) if not files[j].is_file()]
        for start in range(0, len(missing), batch_size):
            chosen = missing[start : start + batch_size]
            seeds = [draws.torch_seed(seed, f"geneval/{index}/{j}") for j in chosen]
            images = draw([metadata["prompt"]] * len(chosen), seeds)
            for j, image in zip(chosen, images, strict=True):
                _save_png(image, files[j])
        if progress:
            progress(done + 1, len(mine))
    while is_main and world > 1:  # no barrier, whose patience would end before the others' work
        left = sum(not all(file.is_file() for file in _images(out, index, num)) for index in numbers)
        if progress:
            progress(len(prompts) - left, len(prompts))
        if not left:
            break
        time.sleep(SHARE_SECONDS)
    return out


def _images(out: Path, index: int, num: int) -> list[Path]:
    """The files of the images of one prompt."""
    return [out / f"{index:05}" / "samples" / f"{j:05}.png" for j in range(num)]


@dataclass(frozen=True)
class Score:
    """What the evaluator found. `tasks`: task -> share of correct images; `overall`: the mean over tasks."""

    tasks: dict[str, float]
    images: dict[str, int]
    overall: float
    prompts: int
    correct_prompts: float  # share of prompts with at least one correct image

    def to_dict(self) -> dict[str, Any]:
        """JSON form, scores in per cent as they are published."""
        rows = [
            {"task": task, "score": 100 * score, "images": self.images[task]}
            for task, score in self.tasks.items()
        ]
        return {
            "rows": rows,
            "overall": 100 * self.overall,
            "images": sum(self.images.values()),
            "prompts": self.prompts,
            "correct_prompts": 100 * self.correct_prompts,
        }


def score(path: str | Path) -> Score:
    """Read the evaluator's results (JSON lines). Raises DataError that names the line.

    A task's score is its share of correct images; the overall score is the mean of the tasks', not of the images.
    """
    correct: dict[str, list[bool]] = {}
    prompts: dict[str, bool] = {}
    for number, found in _json_lines(Path(path), "results"):
        tag, right = found.get("tag"), found.get("correct")
        if not isinstance(tag, str) or not isinstance(right, bool):
            raise DataError(
                f"{str(path)!r}, line {number}: not a result of GenEval's evaluator; expected the keys tag and correct"
            )
        correct.setdefault(tag, []).append(right)
        prompt = json.dumps(found.get("metadata", found.get("prompt")), sort_keys=True)
        prompts[prompt] = prompts.get(prompt, False) or right
    if not correct:
        raise DataError(f"{str(path)!r} holds no results")
    order = [task for task in TASKS if task in correct] + sorted(set(correct) - set(TASKS))
    tasks = {task: sum(correct[task]) / len(correct[task]) for task in order}
    return Score(
        tasks=tasks,
        images={task: len(correct[task]) for task in order},
        overall=math.fsum(tasks.values()) / len(tasks),
        prompts=len(prompts),
        correct_prompts=sum(prompts.values()) / len(prompts),
    )


def compare_scores(student: Score, teacher: Score) -> dict[str, Any]:
    """Two results side by side, in per cent. Raises DataError where they are not of the same tasks and images."""
    if student.images != teacher.images:
        raise DataError(
            f"the two results are not of the same images: {teacher.images} against {student.images}; "
            "score both models on the same prompts with the same --num"
        )
    rows: list[dict[str, Any]] = [
        {"task": task, "teacher": 100 * teacher.tasks[task], "student": 100 * value,
         "difference": 100 * (value - teacher.tasks[task]), "images": student.images[task]}
        for task, value in student.tasks.items()
    ]  # fmt: skip
    overall = {"teacher": 100 * teacher.overall, "student": 100 * student.overall}
    return {"rows": rows, "overall": overall | {"difference": overall["student"] - overall["teacher"]}}


def _json_lines(path: Path, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{what} {str(path)!r}: larger than {MAX_BYTES >> 20} MB")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"can't read {what} {str(path)!r}: {reason}; expected a JSON-lines file") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            raise DataError(
                f"{what} {str(path)!r}, line {number}: not JSON; expected one object a line"
            ) from None
        if not isinstance(found, dict):
            raise DataError(
                f"{what} {str(path)!r}, line {number}: a {type(found).__name__}; expected an object"
            )
        yield number, found


def _agree(out: Path, protocol: dict[str, Any]) -> None:
    """Keep the protocol of a folder, or refuse to mix two."""
    file = out / "protocol.json"
    if file.is_file():
        try:
            known = weights.read_json(file, "protocol")
        except CheckpointError as error:
            raise RunError(str(error)) from None
        differing = sorted(k for k in {*known, *protocol} if known.get(k) != protocol.get(k))
        if differing:
            raise RunError(
                f"{str(out)!r} holds images of another protocol (different: {', '.join(differing)}); give another --out"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{str(out)!r} is not an empty folder; give another --out")
    weights.write_json(file, protocol)


def _save_png(image: Any, path: Path) -> None:
    import io

    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    weights.write_bytes(path, buffer.getvalue())
