"""Prompt alignment by CLIP: how near an image lies to its caption (CLIPScore of arXiv 2104.08718 without its factor).

Needs transformers (`pip install 'grafting[text]'`) and the weights of a CLIP. Axes: B batch, H W pixels, S side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grafting.data.prompts import read_prompts
from grafting.data.text import file_digest
from grafting.errors import CheckpointError, DataError
from grafting.evaluation.measure import sampling_protocol
from grafting.evaluation.reference import Progress
from grafting.evaluation.samples import SampleFile
from grafting.formats import weights
from grafting.loading import download

# What CLIP was trained on; a folder's preprocessor_config.json may say otherwise.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_FILES = ["*.json", "*.txt", "*.safetensors"]


def evaluate_alignment(
    samples: str | Path, clip: str, captions: str | Path | None = None, *, batch_size: int = 64,
    device: str | torch.device = "cpu", progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """{"metrics": {"clip_score"}, "protocol"} of a sample file; `compare` takes it.

    `clip_score` is the mean over images of max(100 cos(image, caption), 0). clip: the folder or hub id of a
    `CLIPModel` with its tokenizer. captions: one for each image, in order, as a prompt file; default: what
    `graft sample` wrote beside the samples. Raises DataError, CheckpointError.
    """
    file = SampleFile.open(samples)
    texts = _captions(Path(samples), captions, file.num_samples)
    scorer = ClipScorer(clip, device=device)
    found: list[Tensor] = []
    done = 0
    for images in file.images(batch_size):
        found.append(scorer.cosines(images, texts[done : done + len(images)]))
        done += len(images)
        if progress:
            progress(done, file.num_samples)
    scores = (100 * torch.cat(found)).clamp(min=0)
    return {
        "metrics": {"clip_score": scores.double().mean().item()},
        "protocol": sampling_protocol(file) | {
            "clip": {"name": scorer.name, "hash": scorer.weights_hash},
            "captions_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
            "captions_cut": scorer.num_cut(texts),
        },
    }  # fmt: skip


class ClipScorer:
    """A `CLIPModel` of transformers with its tokenizer, from a folder or the hub.

    `name`, and `weights_hash`: over the contents of its weight files.
    """

    def __init__(self, source: str, *, device: torch.device | str = "cpu") -> None:
        try:
            import transformers
        except ImportError:
            raise CheckpointError(
                "alignment by CLIP needs transformers: pip install 'grafting[text]'"
            ) from None
        folder = Path(source) if Path(source).exists() else download(source, _FILES)
        if not folder.is_dir() or _json(folder / "config.json").get("model_type") != "clip":
            raise CheckpointError(
                f"{source!r} is no CLIP: expected a folder or hub id of a CLIPModel, such as "
                "openai/clip-vit-large-patch14"
            )
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{source!r} has no .safetensors weights; other formats are not read")
        self.name, self.device = folder.name if Path(source).exists() else source, torch.device(device)
        self.weights_hash = hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()
        try:
            self.tokenizer: Any = transformers.CLIPTokenizer.from_pretrained(folder)
            model: Any = transformers.CLIPModel.from_pretrained(folder)
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise CheckpointError(f"can't load the CLIP {source!r}: {reason[:200]}") from None
        self.model: Any = model.to(self.device).eval()
        self.side: int = self.model.config.vision_config.image_size
        self.max_tokens: int = self.model.config.text_config.max_position_embeddings
        given = _json(folder / "preprocessor_config.json")
        self.mean = torch.tensor(given.get("image_mean", _MEAN)).view(1, 3, 1, 1)
        self.std = torch.tensor(given.get("image_std", _STD)).view(1, 3, 1, 1)

    def pixels(self, images: np.ndarray) -> Tensor:
        """uint8 [B, H, W, 3 or 1] -> [B, 3, S, S]: short side to S (bicubic), centre crop, normalised."""
        from PIL import Image

        side, found = self.side, []
        for image in images:
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
            scale = side / min(picture.size)
            width, height = (max(side, round(length * scale)) for length in picture.size)
            if picture.size != (width, height):
                picture = picture.resize((width, height), Image.Resampling.BICUBIC)
            left, top = (width - side) // 2, (height - side) // 2
            picture = picture.crop((left, top, left + side, top + side))
            found.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        return (torch.stack(found).float() / 255 - self.mean) / self.std

    @torch.no_grad()
    def cosines(self, images: np.ndarray, texts: Sequence[str]) -> Tensor:
        """Cosine [B] of each image (uint8 [B, H, W, C]) with its text."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        output = self.model(
            input_ids=tokens.input_ids.to(self.device), attention_mask=tokens.attention_mask.to(self.device),
            pixel_values=self.pixels(images).to(self.device),
        )  # fmt: skip
        return torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds).float().cpu()

    def num_cut(self, texts: Sequence[str]) -> int:
        """How many texts have more tokens than CLIP reads."""
        return sum(len(ids) > self.max_tokens for ids in self.tokenizer(list(texts)).input_ids)


def _captions(samples: Path, given: str | Path | None, num: int) -> list[str]:
    """The text of every image."""
    path = Path(given) if given is not None else samples.with_suffix(".captions.jsonl")
    if given is None and not path.is_file():
        raise DataError(
            f"{str(samples)!r} has no captions beside it ({path.name}); give a prompt file as captions (--captions)"
        )
    texts = [prompt.text for prompt in read_prompts(path)]
    if len(texts) != num:
        raise DataError(f"{path} has {len(texts)} captions for {num} images; give one for each, in order")
    return texts


def _json(path: Path) -> dict[str, Any]:
    return weights.read_json(path, "CLIP configuration") if path.is_file() else {}
