"""Samples of a model as a `.npz` with its protocol, and a PNG grid.

Noise and label of image i are functions of (seed, i): another batch size changes an image by rounding only, another
number of processes not at all.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import grafting
from grafting import draws
from grafting.class_labels import check_labels, name_labels
from grafting.conditioning import move
from grafting.data.text import CaptionSource
from grafting.diffusion import sample
from grafting.errors import GraftError
from grafting.evaluation.samples import SampleWriter, protocol_text
from grafting.families import family_of
from grafting.families.base import unwrap
from grafting.families.codec import decoder, own_vae
from grafting.formats.weights import combined_digest, digests, new_file, write_bytes
from grafting.parts import Parts
from grafting.surgery import record_of
from grafting.training.acceleration import compiled, compiles
from grafting.training.compute import make_compute

Progress = Callable[[int, int], None]
SHEET_PIXELS = 16_000_000  # of a sheet of samples; many programs refuse to open more than some 100 million


def generate(
    model: nn.Module,
    path: str | Path,
    *,
    num: int,
    steps: int = 50,
    sampler: str = "ddim",
    guidance: float = 1.5,
    seed: int = 0,
    batch_size: int | Literal["auto"] = 100,
    precision: str = "fp32",
    compile: bool | Literal["auto"] = "auto",
    vae: str | None = None,
    captions: CaptionSource | None = None,
    labels: Sequence[int] | np.ndarray | Tensor | None = None,
    describe: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Draw `num` images of a model and write them to `path` (.npz), with a sheet of the first, `<path>.png`, beside it.

    The label of image i is `labels[i]`, or i modulo the number of classes; with `captions`, which a model that is not
    class-conditional needs, modulo their number (or the class of that caption, where captions have one), and their
    texts are written beside (`<path>.captions.jsonl`). Of several processes each draws some of the batches and the
    first makes the file. Finished batches are kept in a folder beside it (`parts`) until it is whole: the same call
    after a stop draws the others only.
    `describe` is added to the protocol (model, plan).
    batch_size: "auto" draws as many at once as the memory of the device takes, and halves that where it does not.
    Raises GraftError.
    """
    path = Path(path)
    if num < 1 or (batch_size != "auto" and batch_size < 1):
        raise GraftError(f"num={num}, batch_size={batch_size}: both are at least 1")
    if path.suffix != ".npz":
        raise GraftError(f"{str(path)!r}: samples go into an .npz file")
    if not math.isfinite(guidance) or guidance < 0:
        raise GraftError(f"guidance={guidance}: expected a finite number of at least 0; 1 means none")
    family = family_of(model)
    classes = family.num_classes(model)
    if classes is None and not captions:
        raise GraftError(
            "this model is conditioned on captions: give them (--prompts FILE, or --data FOLDER of graft synthesize; "
            "in Python captions=)"
        )
    texts = captions if classes is None else None
    kinds = classes if texts is None else len(texts)
    assert kinds is not None
    compute = make_compute(next(model.parameters()).device, precision)
    device = compute.device
    model.to(device)
    decode = decoder(model, vae, device)
    shape = family.sample_shape(model)
    numbers = np.arange(num) % kinds
    classes_of = texts.labels if texts is not None else None
    if labels is not None and classes is None:
        raise GraftError(
            "labels are for models of classes; this one is conditioned on captions: leave them out"
        )
    if labels is not None:
        numbers = check_labels(labels, num, classes)
    labels = numbers if classes_of is None else np.asarray(classes_of)[numbers]
    named = name_labels(labels, kinds) if classes_of is None else f"class of caption i mod {kinds}"
    protocol = {
        "num_samples": num, "steps": steps, "sampler": sampler, "guidance": guidance, "seed": seed,
        "labels": named, "precision": compute.precision, **(describe or {}),
    }  # fmt: skip
    if texts is not None:
        protocol |= {"captions": texts.name, "captions_sha256": texts.content_hash}
    protocol_text(path, protocol)  # refused before anything is drawn
    model.eval()

    def choose() -> int:
        if batch_size != "auto":
            return batch_size
        from grafting.analysis.headroom import fitting_batch_size

        return fitting_batch_size(
            model, num, device, guidance=guidance, precision=compute.precision, processes=compute.world
        )

    def identity() -> dict[str, Any]:
        """What images depend on: those of a stopped attempt are gone on with where all of it is the same."""
        latents = shape[0] not in (1, 3)
        return {
            "protocol": protocol, "batch_size": batch_size, "shape": shape, "device": device.type,
            "compiled": compiles(compile, device), "vae": _vae_name(model, vae) if latents else None,
            "weights": combined_digest(digests(model)), **_structure(model), "version": grafting.__version__,
        }  # fmt: skip

    def draw(index: Tensor) -> np.ndarray:
        if texts is not None:
            condition = move(texts.conditions(index % kinds), device)
        else:
            condition = torch.from_numpy(numbers)[index].to(device)
        index = index.to(device)
        noise = draws.normal(seed, "sample/start", index, shape)
        with compute.autocast():
            x0 = sample(
                model, noise, condition, steps=steps, sampler=sampler, guidance=guidance,
                step_noise=lambda step: draws.normal(seed, f"sample/step{step}", index, shape),
            )  # fmt: skip
        return decode(x0)

    def tell(done: int) -> None:
        if progress:
            progress(min(num, done * parts.size), num)

    parts = Parts(path, num, compute, tell)
    with parts.opened(identity, choose):
        fitting = _within_memory(draw, parts.size, device, halve=batch_size == "auto")
        with compiled(family.compilable(model), compile, device):
            parts.draw(lambda rows: fitting(torch.tensor(rows)))
        if not compute.is_main:
            parts.await_end()
            return path
        parts.await_all()
        _assemble(path, parts, labels, protocol, kinds, texts)
    return path


def _assemble(
    path: Path, parts: Parts, labels: np.ndarray, protocol: dict[str, Any], kinds: int, texts: CaptionSource | None
) -> None:  # fmt: skip
    """Write the file of all batches, last; its sheet and the captions beside it are there when it is."""
    sheet: list[np.ndarray] = []
    shown, columns = min(parts.num, 10 * kinds, 100), min(10, kinds)
    with contextlib.ExitStack() as stack:
        writer: SampleWriter | None = None
        for number, images in enumerate(parts.images()):
            if writer is None:
                writer = stack.enter_context(
                    SampleWriter(path, parts.num, images.shape[1:], labels, protocol)
                )
            writer.append(images)
            if number * parts.size < shown:  # smaller at once: 100 images of 2048x2048 are 1.3 GB
                sheet.append(smaller(images, _tile_side(shown, columns, *images.shape[1:3])))
        save_grid(np.concatenate(sheet)[:shown], path.with_suffix(".png"), columns=columns)
        if texts is not None:
            given = texts.captions
            lines = [json.dumps({"caption": given[number % kinds]}) for number in range(parts.num)]
            write_bytes(path.with_suffix(".captions.jsonl"), ("\n".join(lines) + "\n").encode())


def _structure(model: nn.Module) -> dict[str, Any]:
    """What is in no weight: the architecture, and the plan of an edited model."""
    record = record_of(unwrap(model))
    if record is None:
        return {"architecture": family_of(model).architecture(model), "plan": None}
    return {"architecture": record.architecture, "plan": record.plan.to_dict()}


def _vae_name(model: nn.Module, vae: str | None) -> str:
    """Which VAE decodes: a folder by its whole path, or a hub id."""
    name = own_vae(model) if vae is None else vae
    return str(Path(name).resolve()) if Path(name).exists() else name


def _within_memory(
    draw: Callable[[Tensor], np.ndarray], size: int, device: torch.device, *, halve: bool
) -> Callable[[Tensor], np.ndarray]:
    """`draw` in parts of at most `size` samples; halve: where the device has no memory for those, of half as many.

    Raises GraftError for a part that does not fit and can't be halved.
    """
    limit = size

    def drawn(index: Tensor) -> np.ndarray:
        nonlocal limit
        parts: list[np.ndarray] = []
        while len(index):
            part = index[:limit]
            try:
                parts.append(draw(part))
                index = index[limit:]
                continue
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
            if not halve or len(part) == 1:  # what the failed pass held is given back by now
                remedy = (
                    "lower batch_size, or give auto" if len(part) > 1 else "free some, or give fewer pixels"
                )
                raise GraftError(
                    f"{device} has no memory to draw {len(part)} at once ({reason[:120]}); {remedy}"
                )
            limit = len(part) // 2
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return np.concatenate(parts)

    return drawn


def save_grid(images: np.ndarray, path: Path, columns: int = 10) -> None:
    """uint8 images [N, H, W, C] side by side as a PNG, made smaller where it would have more than SHEET_PIXELS."""
    from PIL import Image

    images = smaller(images, _tile_side(len(images), columns, *images.shape[1:3]))
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 2) - 2, columns * (width + 2) - 2, channels), 255, dtype=np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + 2), number % columns * (width + 2)
        sheet[top : top + height, left : left + width] = image
    with new_file(path) as file:
        Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(file, format="PNG")


def _tile_side(count: int, columns: int, height: int, width: int) -> int:
    """Pixels of the longer side of an image of a sheet, no more than the image has."""
    pixels = math.ceil(count / columns) * columns * height * width
    return max(1, int(max(height, width) * min(1.0, math.sqrt(SHEET_PIXELS / pixels))))


def smaller(images: np.ndarray, side: int) -> np.ndarray:
    """uint8 images [N, H, W, C] with no side longer than `side`."""
    from PIL import Image

    height, width = images.shape[1:3]
    if max(height, width) <= side:
        return images
    size = [max(1, pixels * side // max(height, width)) for pixels in (width, height)]
    shrunk = [
        np.asarray(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).resize(size))
        for image in images
    ]
    return np.stack(shrunk).reshape(len(images), size[1], size[0], -1)
