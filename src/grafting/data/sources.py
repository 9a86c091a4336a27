"""What the stages take as data, and what `load_dataset` can read.

Packaged names, `.npz`, IDX folders, folders and files of latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from grafting.conditioning import Caption
from grafting.data.dataset import DataSource, ImageLabelDataset
from grafting.data.fashion import NUM_CLASSES, SPLITS, has_idx_files, load_full, packaged_subset, pad_to_32
from grafting.data.latents import LatentDataset, is_latents
from grafting.data.npz import NpzReader
from grafting.data.text import CaptionDataset, is_caption_folder
from grafting.errors import CheckpointError, DataError
from grafting.formats.limits import check_safetensors

PACKAGED = ("fashion-10",)
_FASHION = "fashion:"


def load_dataset(source: str | Path) -> ImageLabelDataset | LatentDataset | CaptionDataset:
    """Load labelled images or latents, or latents with captions, from a packaged name or a file.

    `source` is one of
    - `fashion-10`: the shipped stratified 10 % of Fashion-MNIST's training set, [6000, 1, 32, 32];
    - a folder that `graft synthesize` made: latents with captions;
    - a folder with Fashion-MNIST's IDX files, or `fashion:FOLDER` (`fashion:FOLDER:test` for its test split);
    - a folder of latents that `graft encode` wrote, memory-mapped;
    - a `.npz` file: `arr_0` uint8 [N, H, W, C] or float [N, C, H, W], `arr_1` integer labels [N];
    - a `.safetensors` file of latents: `x` float [N, C, H, W], taken as it is, `y` integer labels [N];
      `name` and `num_classes` in its metadata are used.
    Raises `DataError` that says what was found and what can be read.
    """
    text = str(source)
    if text == "fashion-10":
        images, labels = packaged_subset()
        return _fashion(images, labels, text)
    if text.startswith(_FASHION):
        folder, split = text.removeprefix(_FASHION), "train"
        for ending in SPLITS:
            if folder.endswith(f":{ending}"):  # a folder's own name may hold colons
                folder, split = folder.removesuffix(f":{ending}"), ending
        return _fashion(*load_full(folder, split), f"fashion-{split}")
    path = Path(source)
    if path.is_dir():
        if is_latents(path):
            return LatentDataset.open(path)
        if (path / "parts" / "job.json").is_file():
            raise DataError(
                f"the latents in {path} are not finished; give the same graft encode command again"
            )
        if is_caption_folder(path):
            return CaptionDataset(path)
        if has_idx_files(path):
            return _fashion(*load_full(path, "train"), "fashion-train")
        raise DataError(
            f"folder {path} has no latents.json and no train-images-idx3-ubyte(.gz); make latents of a folder of "
            "images with graft encode, or give a .npz or .safetensors file"
        )
    if not path.is_file():
        raise DataError(
            f"no data at {text!r}: expected {', '.join(PACKAGED)}, fashion:FOLDER, a folder of IDX files, "
            "of latents (graft encode) or of pairs (graft synthesize), a .npz or a .safetensors file"
        )
    if path.suffix == ".npz":
        return _from_npz(path)
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    raise DataError(f"cannot tell what {path} is by its name; expected .npz or .safetensors")


def as_data(data: Any) -> DataSource:
    """Data in any form that the stages take, as a `DataSource`.

    A `DataSource` is taken as it is; a packaged name or a path goes to `load_dataset`. An `ImageLabelDataset` is made
    of a pair (x [N, C, H, W], y [N]) of tensors or arrays, {"x": ..., "y": ...}, a `TensorDataset` of the two, a
    map-style dataset of pairs (image, label) or items {"x": ..., "y": ...}, or a `DataLoader` of such, of which the
    dataset alone is taken: batches and their order are the stage's own. Images are uint8, or floating and then taken as
    they are: pixels in [-1, 1], not in [0, 1]; latents at the scale of the model's VAE. Labels are integers.
    Raises DataError.
    """
    if isinstance(data, (str, Path)):
        return load_dataset(data)
    if callable(getattr(data, "batch", None)) and hasattr(data, "__len__"):
        return cast(DataSource, data)
    if isinstance(data, Mapping) and {"x", "y"} <= set(data):
        return ImageLabelDataset(data["x"], data["y"])
    if isinstance(data, torch.utils.data.TensorDataset) and len(data.tensors) == 2:
        return ImageLabelDataset(*data.tensors)
    if isinstance(data, (tuple, list)) and len(data) == 2 and getattr(data[0], "ndim", 0) == 4:
        if isinstance(data[1], Caption):
            raise DataError(
                "data: images and captions in memory: give the folder of graft synthesize, or an object with the "
                "methods of grafting.data.DataSource whose batch gives x and a Caption (docs/python.md)"
            )
        return ImageLabelDataset(*data)
    pairs = data.dataset if isinstance(data, torch.utils.data.DataLoader) else data
    if (
        hasattr(pairs, "__len__")
        and hasattr(pairs, "__getitem__")
        and not isinstance(pairs, (Mapping, Tensor, np.ndarray))
    ):
        return _from_pairs(pairs)
    raise DataError(
        f"data: got {type(data).__name__}; expected a packaged name ({', '.join(PACKAGED)}), a path, what load_dataset "
        "returns, a pair of tensors (x [N, C, H, W], y [N]), or a dataset of pairs (image [C, H, W], label)"
    )


def _from_pairs(pairs: Any) -> ImageLabelDataset:
    """All items of a map-style dataset in memory. Raises DataError that says which item is none, and why."""
    images, labels = [], []
    for index in range(len(pairs)):
        try:
            item = pairs[index]
            x, y = (item["x"], item["y"]) if isinstance(item, Mapping) else item
            images.append(torch.as_tensor(x))
            labels.append(_label(y))
        except Exception as error:  # of the dataset's own code, too
            reason = next(iter(str(error).splitlines()), "")[:200]
            raise DataError(
                f"data: item {index} of {type(pairs).__name__} can't be read as a pair (image [C, H, W], label) or "
                f'{{"x": image, "y": label}}: {type(error).__name__}: {reason}'
            ) from error
        if images[-1].shape != images[0].shape:
            raise DataError(
                f"data: item {index} of {type(pairs).__name__} has shape {list(images[-1].shape)}, item 0 "
                f"{list(images[0].shape)}; give images of one size"
            )
    if not images:
        raise DataError(f"data: {type(pairs).__name__} has no items")
    return ImageLabelDataset(torch.stack(images), torch.tensor(labels))


def _label(y: Any) -> int:
    """A class number of an item: the kinds that a tensor of labels may have. Raises TypeError."""
    label = torch.as_tensor(y)
    if label.numel() != 1 or label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        raise TypeError(f"the label is {y!r}, expected one integer")
    return int(label)


def _fashion(images: np.ndarray, labels: np.ndarray, name: str) -> ImageLabelDataset:
    x, y = torch.from_numpy(pad_to_32(images)), torch.from_numpy(labels)
    return ImageLabelDataset(x, y, name=name, num_classes=NUM_CLASSES)


def _from_npz(path: Path) -> ImageLabelDataset:
    archive = NpzReader(path)
    header = archive.header("arr_0")
    if "arr_1" not in archive:
        raise DataError(f"{path} has no labels: expected integer labels [N] as array 'arr_1'")
    if len(header.shape) != 4:
        raise DataError(
            f"{path}: arr_0 has shape {list(header.shape)}, expected [N, H, W, C] or [N, C, H, W]"
        )
    images, labels = archive.read("arr_0"), archive.read("arr_1")
    if images.dtype == np.uint8:
        images = images.transpose(0, 3, 1, 2)
    elif images.dtype.kind != "f":
        raise DataError(f"{path}: arr_0 is {images.dtype}, expected uint8 [N, H, W, C] or float [N, C, H, W]")
    if labels.dtype.kind not in "iu":
        raise DataError(f"{path}: arr_1 is {labels.dtype}, expected integer labels")
    x = torch.from_numpy(np.ascontiguousarray(images, dtype=images.dtype.newbyteorder("=")))
    return ImageLabelDataset(x, torch.from_numpy(labels.astype(np.int64)), name=path.stem)


def _from_safetensors(path: Path) -> ImageLabelDataset:
    from safetensors import SafetensorError, safe_open

    try:
        check_safetensors(path)
        with safe_open(path, framework="pt") as file:
            held = sorted(file.keys())
            if not {"x", "y"} <= set(held):
                raise DataError(
                    f"{path} holds {', '.join(held)}; expected latents 'x' [N, C, H, W] and labels 'y'"
                )
            x, y, metadata = file.get_tensor("x"), file.get_tensor("y"), file.metadata() or {}
    except (SafetensorError, OSError, CheckpointError, RuntimeError, AttributeError, KeyError) as error:
        raise DataError(
            f"cannot read {path} as safetensors: {str(error)[:200]}; write or download it again"
        ) from error
    if not x.is_floating_point():
        raise DataError(f"{path}: latents 'x' must be floating point, got {x.dtype}")
    if x.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise DataError(f"{path}: latents 'x' are {x.dtype}, expected float16, bfloat16, float32 or float64")
    text = metadata.get("num_classes")
    if text is not None and not (text.isdecimal() and len(text) < 10):
        raise DataError(f"{path}: num_classes in its metadata is {text!r}, expected a number")
    num_classes = None if text is None else int(text)
    return ImageLabelDataset(x, y, name=metadata.get("name", path.stem), num_classes=num_classes)
