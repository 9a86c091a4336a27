"""`graft synthesize`: training pairs sampled from a text-to-image model itself (arXiv 2506.05340, section 5).

Captions of all shards are encoded first and the text encoder is freed; then the latents of each shard are sampled by
DPM-Solver++. A shard's files appear whole or not at all, and depend on the arguments alone: any number of processes and
any number of stops give the same bytes.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grafting import draws
from grafting.conditioning import Caption
from grafting.data import text as captions
from grafting.data.packaged_captions import PackagedCaptions, is_packaged
from grafting.data.prompts import Prompt, TextEncoder, read_prompts
from grafting.diffusion import NUM_TIMESTEPS, sample
from grafting.errors import DataError, GraftError, RunError
from grafting.families import family_of
from grafting.formats import weights
from grafting.formats.pipeline_folder import (
    check_schedule,
    check_size,
    find_pipeline,
    transformer_config,
)
from grafting.loading import load_model
from grafting.text_inputs import at_size
from grafting.training.compute import Compute

Progress = Callable[[str, int, int], None]
VISIBLE_SECONDS = 90.0  # until what another machine wrote is seen on a network disk


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """What is made; height and width in pixels, by default the model's own."""

    num: int
    steps: int = 20
    guidance: float = 4.5
    height: int | None = None
    width: int | None = None
    batch_size: int = 4
    shard_size: int = 64
    seed: int = 0
    max_tokens: int | None = None
    truncate: bool = False

    def __post_init__(self) -> None:
        for name in ("num", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise GraftError(f"{name}={getattr(self, name)}: at least 1")
        if not 1 <= self.steps <= NUM_TIMESTEPS:
            raise GraftError(f"steps={self.steps}: expected a whole number from 1 to {NUM_TIMESTEPS}")
        if not math.isfinite(self.guidance) or self.guidance < 0:
            raise GraftError(
                f"guidance={self.guidance}: expected a finite number of at least 0; 1 means none"
            )


def synthesize(
    source: str, prompts: str | Path, out: str | Path, settings: Synthesis, *, compute: Compute,
    dtype: torch.dtype | None = None, resume: bool = False, progress: Progress | None = None,
    pipeline: str | None = None,
) -> Path:  # fmt: skip
    """Make `settings.num` pairs of the pipeline `source` (folder, hub id, or a graft of one) in the folder `out`.

    Prompt i is line i of the file, from the start again where there are fewer; captions of a packaged name
    (`emoji-train`) need no text encoder, and `source` then no pipeline: `pixart-emoji` has none. pipeline: where the
    rest of the pipeline is, for a `source` that is a transformer alone. `resume` goes on where a run with the same
    arguments stopped. Returns the quality page. Raises GraftError that says what to do.
    """
    out, folder = Path(out), None
    encoded = PackagedCaptions(str(prompts)) if is_packaged(prompts) else None
    if encoded is not None:
        if settings.max_tokens is not None or settings.truncate:
            raise GraftError(
                f"the captions {str(prompts)!r} are encoded already: leave out max_tokens and truncate "
                "(--max-tokens, --truncate)"
            )
        found = [Prompt(number, text) for number, text in enumerate(encoded.captions, 1)]
    else:
        folder, found = find_pipeline(pipeline or source), read_prompts(prompts)
        check_schedule(folder)
        check_size(folder, settings.height, settings.width)  # before captions are encoded
    chosen = [found[i % len(found)] for i in range(settings.num)]
    job = _Job(
        source,
        folder,
        chosen,
        str(prompts),
        out,
        settings,
        compute,
        dtype,
        progress or _silent,
        encoded,
        pipeline,
    )
    job.begin(resume)
    job.encode()
    compute.wait()
    model = job.load()
    job.sample(model)
    compute.wait(job.count_shards)  # and none goes on before the slowest has written its last shard
    if compute.is_main:
        job.finish(model)
    return out / "quality.html"


class _Job:
    def __init__(
        self, source: str, folder: Path | None, prompts: list[Prompt], file: str, out: Path, settings: Synthesis,
        compute: Compute, dtype: torch.dtype | None, progress: Progress, encoded: PackagedCaptions | None,
        pipeline: str | None,
    ) -> None:  # fmt: skip
        self.source, self.folder, self.prompts, self.file, self.out = source, folder, prompts, file, out
        self.encoded, self.pipeline = encoded, pipeline
        self.settings, self.compute, self.dtype, self.progress = settings, compute, dtype, progress
        self.num_shards = -(-len(prompts) // settings.shard_size)
        self.mine = list(range(compute.rank, self.num_shards, compute.world))

    def rows(self, shard: int) -> range:
        size = self.settings.shard_size
        return range(shard * size, min((shard + 1) * size, len(self.prompts)))

    def begin(self, resume: bool) -> None:
        """Refuse to mix two jobs in one folder; note what this one is."""
        path = self.out / captions.MANIFEST
        if path.is_file():
            known = captions.read_manifest(self.out)
            before, now = {"precision": "fp32", **known["protocol"]}, self.protocol()
            differing = [key for key, value in now.items() if before.get(key) != value]
            if differing:
                raise RunError(
                    f"{str(self.out)!r} was made with other arguments (different: {', '.join(differing)}); "
                    "give another --out"
                )
            if not resume and self.compute.is_main:
                raise RunError(
                    f"{str(self.out)!r} was begun already; go on with --resume, or give another --out"
                )
        elif self.compute.is_main:
            if self.out.exists() and not (
                self.out.is_dir() and all(map(self.is_ours(resume), self.out.iterdir()))
            ):
                raise RunError(f"{str(self.out)!r} is not an empty folder; give another --out")
            lines = "".join(json.dumps({"caption": prompt.text}) + "\n" for prompt in self.prompts)
            weights.write_bytes(self.out / "captions.jsonl", lines.encode())
            self.write_manifest(shape=[0, 0, 0], caption_width=0, num_tokens=0, files={}, complete=False)

    @staticmethod
    def is_ours(resume: bool) -> Callable[[Path], bool]:
        """Whether a file can be of a job that was killed before it had a manifest: such a job may be gone on with."""
        return lambda path: resume and (path.name == "captions.jsonl" or weights.is_partial(path))

    def protocol(self) -> dict[str, Any]:
        texts = "\n".join(prompt.text for prompt in self.prompts)
        return {
            "model": self.source, **({"pipeline": self.pipeline} if self.pipeline else {}), "sampler": "dpm++",
            **asdict(self.settings),
            "dtype": str(self.dtype).removeprefix("torch.") if self.dtype else None,
            "precision": self.compute.precision, "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        }  # fmt: skip

    def write_manifest(self, **content: Any) -> None:
        weights.write_json(self.out / captions.MANIFEST, {
            "format": captions.FORMAT, "version": captions.VERSION, "num": len(self.prompts), **content,
            "protocol": self.protocol(),
        })  # fmt: skip

    # ---- captions

    def encode(self) -> None:
        """Encode the captions of this process's shards and the empty one; the text encoder is gone afterwards."""
        missing = [shard for shard in self.mine if not (self.out / captions.text_file(shard)).is_file()]
        null = self.out / "null.safetensors"
        if not missing and (null.is_file() or not self.compute.is_main):
            return
        if self.encoded is not None or self.folder is None:
            self.copy_encoded(missing, null)
            return
        encoder = TextEncoder(
            self.folder, transformer_config(self.source), device=self.compute.device, dtype=self.dtype,
            max_tokens=self.settings.max_tokens,
        )  # fmt: skip
        if not self.settings.truncate:
            encoder.check_lengths(self.prompts, self.file)
        for done, shard in enumerate(missing):
            texts = [self.prompts[row].text for row in self.rows(shard)]
            size = self.settings.batch_size
            parts = [encoder.encode(texts[start : start + size]) for start in range(0, len(texts), size)]
            embeds, mask = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            _check_finite(embeds, self.rows(shard), "the encoded caption", self.dtype)
            weights.write_safetensors(
                self.out / captions.text_file(shard), captions.pack_captions(embeds, mask)
            )
            self.progress("captions", done + 1, len(missing))
        if self.compute.is_main:
            embeds, mask = encoder.encode([""])
            empty = captions.pack_captions(embeds, mask)
            tensors = {
                "embeds": empty["embeds"],
                "mask": empty["mask"],
                "num_tokens": torch.tensor(encoder.max_tokens),
            }
            weights.write_safetensors(null, tensors)
        del encoder
        gc.collect()
        if self.compute.device.type == "cuda":
            torch.cuda.empty_cache()

    def copy_encoded(self, missing: list[int], null: Path) -> None:
        """Captions that are encoded already."""
        encoded = self.encoded
        assert encoded is not None
        for shard in missing:
            cond = encoded.conditions([row % len(encoded) for row in self.rows(shard)])
            packed = captions.pack_captions(cond.embeds, cond.mask)
            weights.write_safetensors(self.out / captions.text_file(shard), packed)
        if self.compute.is_main:
            weights.write_safetensors(null, {
                "embeds": encoded.null, "mask": torch.ones(len(encoded.null), dtype=torch.uint8),
                "num_tokens": torch.tensor(encoded.num_tokens),
            })  # fmt: skip

    # ---- latents

    def load(self) -> nn.Module:
        """The model, for latents of the size asked for."""
        model = load_model(
            self.source, device=self.compute.device, dtype=self.dtype, pipeline=self.pipeline
        ).eval()
        if self.encoded is not None:
            family = family_of(model)
            family.check_data(
                model, self.encoded.name, family.sample_shape(model), 0, self.encoded.caption_width
            )
        return at_size(model, (self.settings.height, self.settings.width))

    def sample(self, model: nn.Module) -> None:
        """Sample the latents of this process's shards that are not there yet."""
        missing = [shard for shard in self.mine if not (self.out / captions.latents_file(shard)).is_file()]
        null = weights.read_safetensors(self.visible("null.safetensors"))
        total = sum(len(self.rows(shard)) for shard in missing)
        done = 0
        for shard in missing:
            held = weights.read_safetensors(self.out / captions.text_file(shard))
            parts = []
            for rows in torch.tensor(list(self.rows(shard))).split(self.settings.batch_size):
                parts.append(self.draw(model, rows, held, null, shard).cpu())
                done += len(rows)
                self.progress("images", done, total)
            weights.write_safetensors(self.out / captions.latents_file(shard), {"x": torch.cat(parts)})

    def draw(
        self, model: nn.Module, rows: Tensor, held: dict[str, Tensor], null: dict[str, Tensor], shard: int
    ) -> Tensor:
        """Latents [B, C, H, W] float32 of some samples; the noise of sample i depends on the seed and i alone."""
        device, settings = self.compute.device, self.settings
        tokens = int(null["num_tokens"])
        local = [row - shard * settings.shard_size for row in rows.tolist()]
        embeds, mask = captions.unpack_captions(held, local, tokens, held["offsets"])
        empty = torch.tensor([0, len(null["mask"])])
        null_embeds, null_mask = captions.unpack_captions(null, [0] * len(local), tokens, empty)
        cond = Caption(*(tensor.to(device) for tensor in (embeds, mask, null_embeds, null_mask)))
        noise = draws.normal(
            settings.seed, "synthesize/noise", rows.to(device), family_of(model).sample_shape(model)
        )
        with self.compute.autocast():
            x0 = sample(model, noise, cond, steps=settings.steps, sampler="dpm++", guidance=settings.guidance)
        _check_finite(x0, rows.tolist(), "the latent", self.dtype)
        return x0

    # ---- the end

    def count_shards(self) -> None:
        """Say how many shards are there, while the first process waits for those of the others."""
        if self.compute.is_main:
            there = sum((self.out / captions.latents_file(s)).is_file() for s in range(self.num_shards))
            self.progress("shards", there, self.num_shards)

    def visible(self, name: str) -> Path:
        """The path of a file that some process has written. Raises RunError if it is not there."""
        until = time.monotonic() + VISIBLE_SECONDS
        while not (self.out / name).is_file():
            if self.compute.world == 1 or time.monotonic() > until:
                raise RunError(
                    f"{str(self.out)!r} lacks {name}, which a process of this run has written; all machines need the "
                    "same --out, on a shared file system"
                )
            time.sleep(0.5)
        return self.out / name

    def finish(self, model: nn.Module) -> None:
        """Hash every file, write the manifest and the page."""
        from grafting.report.captions import write_quality_page

        weights.clear_partial(self.out)  # nobody writes any more
        null = weights.read_safetensors(self.out / "null.safetensors")
        names = [
            name(shard)
            for shard in range(self.num_shards)
            for name in (captions.text_file, captions.latents_file)
        ]
        names += ["captions.jsonl", "null.safetensors"]
        self.write_manifest(
            shape=list(family_of(model).sample_shape(model)), caption_width=null["embeds"].shape[1],
            num_tokens=int(null["num_tokens"]),
            files={name: captions.file_digest(self.visible(name)) for name in sorted(names)}, complete=True,
        )  # fmt: skip
        write_quality_page(captions.CaptionDataset(self.out), model, self.out / "quality.html", self.folder)


def _check_finite(values: Tensor, rows: Any, what: str, dtype: torch.dtype | None) -> None:
    bad = ~torch.isfinite(values).flatten(1).all(dim=1)
    if bool(bad.any()):
        row = list(rows)[int(bad.nonzero()[0])]
        raise DataError(
            f"{what} of sample {row} is not finite in {str(dtype or torch.float32).removeprefix('torch.')}; "
            "leave out --dtype (--precision bf16 is quick, too)"
        )


def _silent(what: str, done: int, total: int) -> None:
    pass
