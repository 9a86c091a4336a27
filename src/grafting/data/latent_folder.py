"""A folder of latents in the making: what is to be done, what is done, and the manifest that ends it.

    latents-00000.safetensors ...   shards, whole or not there
    parts/job.json                  what is being made; another job is refused
    parts/00000.json                one per finished shard: its hash, and what was skipped
    skipped.jsonl, latents.json     written last; then parts/ is removed

Every file appears whole or not at all and its content follows from the job alone, so processes need not agree on who
writes it, and a process may be killed anywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from grafting.data.latents import is_latents
from grafting.data.manifest import JOB, MANIFEST, SKIPPED, Manifest, Shard, content_hash, read_manifest
from grafting.data.shards import file_sha256, remove_leftovers, write_json, write_tensors, write_whole
from grafting.errors import DataError
from grafting.yaml_io import load_json

_MAX_PART_BYTES = 1 << 28
_IGNORED = {"vae": "source", "images": "name"}  # how a thing was called says nothing about what it is


class LatentFolder:
    """The folder that `graft encode` writes."""

    def __init__(self, path: str | Path, say: Callable[[str], None] = lambda text: None) -> None:
        self.path, self.say = Path(path), say
        self._parts = self.path / "parts"

    # ---- the job

    def begin(self, job: Mapping[str, Any], *, resume: bool = True) -> None:
        """Claim the folder for `job`, or go on with it if it is the one that was begun. Raises `DataError`."""
        known = self.job()
        if known is None:
            self._check_empty()
            known = self._publish(job)
        elif not resume:
            raise DataError(
                f"{str(self.path)!r} already holds latents; go on with --resume, or give another --out"
            )
        differing = _differing(known, job)
        if differing:
            raise DataError(
                f"{str(self.path)!r} holds latents of other images or settings (different: {', '.join(differing)}); "
                "give another --out, or the same images and settings to go on"
            )
        remove_leftovers(self.path)
        remove_leftovers(self._parts)

    def job(self) -> dict[str, Any] | None:
        """What is being made, or was."""
        if is_latents(self.path):
            found = read_manifest(self.path).model_dump(mode="json")
            return {key: found[key] for key in JOB}
        if not (self._parts / "job.json").is_file():
            return None
        data = load_json(self._parts / "job.json", "encoding job", DataError)
        if not isinstance(data, dict):
            raise DataError(f"{self._parts / 'job.json'} is damaged; remove the folder and begin again")
        return data

    def _publish(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Write job.json unless another process was first; returns what is there."""
        path = self._parts / "job.json"
        claim = self._parts / f"claim-{os.getpid()}.json"
        write_json(claim, dict(job))
        try:
            os.link(claim, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(claim, path)
        with contextlib.suppress(OSError):
            claim.unlink()
        return self.job() or dict(job)

    def _check_empty(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"{str(self.path)!r} is a file; give a folder with --out")
        held = [p.name for p in self.path.iterdir() if p.name != "parts"] if self.path.is_dir() else []
        if held:
            raise DataError(
                f"{str(self.path)!r} is not an empty folder and holds no latents of ours (it has {held[0]!r}); give "
                "another --out"
            )

    # ---- shards

    def write(
        self, number: int, span: range, tensors: Mapping[str, Tensor], skipped: list[dict[str, Any]]
    ) -> None:
        """Write a shard, then the note that it is done."""
        file = f"latents-{number:05d}.safetensors"
        size, digest = write_tensors(self.path / file, tensors, {"format": "grafting-latents"})
        shard = Shard(
            file=file, first=span.start, span=len(span), num=len(tensors["y"]), size=size, sha256=digest
        )
        write_json(self._part(number), {"shard": shard.model_dump(mode="json"), "skipped": skipped})

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Which of these shards are still to be made: those without a note, or whose file is not what it says."""
        self._reopen_if_damaged()
        if is_latents(self.path):
            return []
        found = []
        for number in numbers:
            part = self._read_part(number)
            if part is None:
                found.append(number)
            elif not self._is_whole(part[0]):
                self.say(f"warning: {self.path / part[0].file} is damaged and is made again")
                found.append(number)
        return found

    def _is_whole(self, shard: Shard) -> bool:
        path = self.path / shard.file
        return path.is_file() and path.stat().st_size == shard.size and file_sha256(path) == shard.sha256

    def _reopen_if_damaged(self) -> None:
        """Turn a finished folder with damaged shards back into one in the making."""
        if not is_latents(self.path):
            return
        manifest = read_manifest(self.path)
        whole = [self._is_whole(shard) for shard in manifest.shards]
        skipped = _read_skipped(self.path / SKIPPED) if manifest.num_skipped else []
        if all(whole) and len(skipped) == manifest.num_skipped:
            return
        fields = manifest.model_dump(mode="json")
        write_json(self._parts / "job.json", {key: fields[key] for key in JOB})
        for number, (shard, good) in enumerate(zip(manifest.shards, whole, strict=True)):
            own = [s for s in skipped if shard.first <= s["index"] < shard.first + shard.span]
            if good and shard.num + len(own) == shard.span:
                write_json(self._part(number), {"shard": shard.model_dump(mode="json"), "skipped": own})
            else:
                self.say(f"warning: {self.path / shard.file} is damaged and is made again")
                self._part(number).unlink(missing_ok=True)
        (self.path / MANIFEST).unlink(missing_ok=True)

    def _part(self, number: int) -> Path:
        return self._parts / f"{number:05d}.json"

    def _read_part(self, number: int) -> tuple[Shard, list[dict[str, Any]]] | None:
        try:
            with self._part(number).open("rb") as file:
                data = json.loads(file.read(_MAX_PART_BYTES))
            return Shard.model_validate(data["shard"]), _checked(data["skipped"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError, ValidationError):
            return None

    # ---- the end

    def finish(self, num_shards: int) -> Manifest | None:
        """Write the manifest if every shard is there, and remove the notes; None if some are left to others."""
        if is_latents(self.path):
            self._tidy()
            return read_manifest(self.path)
        job = self.job()
        parts = [self._read_part(number) for number in range(num_shards)]
        done = [part for part in parts if part is not None]
        if job is None or len(done) < num_shards:
            return read_manifest(self.path) if is_latents(self.path) else None
        skipped = [entry for _, entries in done for entry in entries]
        num = sum(shard.num for shard, _ in done)
        if num == 0:
            raise DataError(
                f"none of the {job['images']['num']} images could be read; the first, {skipped[0]['path']!r}: "
                f"{skipped[0]['reason']}"
            )
        fields: dict[str, Any] = {
            "version": 1, "num": num, "num_skipped": len(skipped), **job, "environment": _versions(),
            "shards": [shard.model_dump(mode="json") for shard, _ in done],
        }  # fmt: skip
        manifest = Manifest(sha256=content_hash(fields), **fields)
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped]
        write_whole(self.path / SKIPPED, [line.encode("utf-8", "backslashreplace") for line in lines])
        write_json(self.path / MANIFEST, manifest.model_dump(mode="json"))
        self._tidy()
        return manifest

    def _tidy(self) -> None:
        shutil.rmtree(self._parts, ignore_errors=True)


def _differing(known: Mapping[str, Any], job: Mapping[str, Any]) -> list[str]:
    """Keys in which two jobs differ, such as `vae.seed`."""
    found = []
    for key in JOB:
        a, b = known.get(key), job.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [
                f"{key}.{k}" for k in sorted({*a, *b}) if a.get(k) != b.get(k) and _IGNORED.get(key) != k
            ]
        elif a != b:
            found.append(key)
    return found


def _read_skipped(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            return _checked([json.loads(line) for line in file.read(_MAX_PART_BYTES).splitlines()])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []


def _checked(entries: Any) -> list[dict[str, Any]]:
    return [{"index": int(e["index"]), "path": str(e["path"]), "reason": str(e["reason"])} for e in entries]


def _versions() -> dict[str, str]:
    """What computed them; not part of the hash."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("grafting", "torch", "diffusers", "pillow"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
