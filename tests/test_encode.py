"""Images to latents: numbers against diffusers, and the same bytes however it is done and wherever it is stopped."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latent_tools import Killer, config, files, make_world, pixels, save_images
from safetensors.torch import load_file

from grafting import draws
from grafting.data import encode_images, load_dataset, open_images, preview_encoding
from grafting.data.pixels import decode_image
from grafting.errors import DataError, GraftError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE, twelve images in three classes of which one is cut short, and their latents."""
    return make_world(tmp_path_factory.mktemp("encode"))


# ---- numbers


def test_the_mean_is_what_diffusers_gives(world: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    encode_images(world / "images", tmp_path / "z", config(world, mode="mean", dtype="float32", flip=False))
    vae = AutoencoderKL.from_pretrained(world / "vae")
    data = load_dataset(tmp_path / "z")
    source = open_images(world / "images")
    kept = [i for i in range(12) if i != 5]
    for row, index in enumerate(kept):
        image = decode_image(source.read(index), 16)  # type: ignore[arg-type]
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            wanted = vae.encode(x).latent_dist.mode() * 0.5
        torch.testing.assert_close(data.batch([row])[0], wanted, atol=1e-5, rtol=1e-5)
    assert data.batch(range(11))[1].tolist() == [0] * 4 + [1] * 3 + [2] * 4


def test_a_sample_is_mean_plus_drawn_noise_and_a_flip_is_of_the_pixels(world: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(world / "vae")
    shard = load_file(world / "whole" / "latents-00001.safetensors")
    assert shard["index"].tolist() == [6, 7, 8, 9]
    source = open_images(world / "images")
    x = torch.stack([torch.from_numpy(decode_image(source.read(i), 16)) for i in (6, 7, 8, 9)])  # type: ignore[arg-type]
    x = x.permute(0, 3, 1, 2).float() / 127.5 - 1
    for name, side, purpose in (
        ("x", x, "encode/posterior"),
        ("x_flip", x.flip(-1), "encode/posterior/flip"),
    ):
        with torch.no_grad():
            found = vae.encode(side).latent_dist
        noise = draws.normal(0, purpose, shard["index"], (4, 8, 8))
        wanted = ((found.mean + found.std * noise) * 0.5).half()
        torch.testing.assert_close(shard[name], wanted, atol=2e-3, rtol=2e-3)
        assert (found.std > 0.05).all()  # so that the draw is seen


def test_the_crop_halves_by_boxes_then_scales_then_cuts_the_centre() -> None:
    def decoded(array: np.ndarray, size: int) -> np.ndarray:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        found = decode_image(buffer.getvalue(), size)
        assert isinstance(found, np.ndarray)
        return found

    wide = pixels(3, width=24, height=20)
    assert np.array_equal(decoded(wide, 20), wide[:, 2:22])  # no scale: the central columns
    large = pixels(1, width=64, height=64)
    boxes = large.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(decoded(large, 32) - boxes).max() <= 1.0  # two passes, each rounded
    assert np.abs(decoded(large, 16) - large.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))).max() <= 2.0
    scaled = torch.nn.functional.interpolate(
        torch.from_numpy(wide).permute(2, 0, 1)[None].float(), (16, 19), mode="bicubic", antialias=True
    )
    assert np.abs(decoded(wide, 16) - scaled[0, :, :, 1:17].permute(1, 2, 0).numpy()).max() <= 1.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types_on_disk(world: Path, tmp_path: Path, dtype: str) -> None:
    one = config(world, dtype=dtype, flip=False, shard_size=100)
    encode_images(world / "images", tmp_path / "z", one)
    exact = config(world, dtype="float32", flip=False, shard_size=100)
    encode_images(world / "images", tmp_path / "exact", exact)
    data = load_dataset(tmp_path / "z")
    assert load_file(tmp_path / "z" / "latents-00000.safetensors")["x"].dtype == getattr(torch, dtype)
    wanted = load_dataset(tmp_path / "exact").batch(range(11))[0]
    assert torch.equal(data.batch(range(11))[0], wanted.to(getattr(torch, dtype)).float())


# ---- what is left out


def test_a_damaged_image_is_skipped_logged_and_moves_no_other(world: Path, tmp_path: Path) -> None:
    found = encode_images(world / "images", tmp_path / "again", config(world))
    assert found is not None
    assert (found.num, found.num_skipped) == (11, 1)
    (line,) = (tmp_path / "again" / "skipped.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["index"], entry["path"]) == (5, "bee/001.JPEG")
    assert "truncated" in entry["reason"].lower()
    mended = tmp_path / "mended"
    save_images(mended)
    encode_images(mended, tmp_path / "all", config(world))
    whole, gap = (load_file(tmp_path / name / "latents-00001.safetensors") for name in ("all", "again"))
    assert whole["index"].tolist() == [5, 6, 7, 8, 9]
    for name in ("x", "x_flip"):
        assert torch.equal(whole[name][1:], gap[name])


def test_nothing_readable_at_all_is_an_error(world: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"none of the 1 images .*a\.jpg.*not a JPEG"):
        encode_images(tmp_path / "images", tmp_path / "z", config(world))


# ---- stopped anywhere


def forked(work: Any) -> int:
    """Run `work` in a child process; returns its pid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of newer Pythons, about threads
        pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid


def test_killed_at_every_step_on_the_disk(world: Path, tmp_path: Path) -> None:
    """SIGKILL just before each write, fsync, rename, link and unlink in turn: going on gives the same bytes."""
    wanted = files(world / "whole")
    step, ended = 0, False
    while not ended:
        out = tmp_path / f"{step}"

        def work(out: Path = out, step: int = step) -> None:
            count = 0

            def watch(event: str, args: tuple[Any, ...]) -> None:
                nonlocal count
                is_ours = any(
                    isinstance(arg, str) and arg.startswith(str(out)) for arg in map(_text, args[:1])
                )
                if is_ours and (event != "open" or "w" in str(args[1])):
                    count += 1
                    if count > step:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(watch)
            encode_images(world / "images", out, config(world), num_threads=1)
            os._exit(0)

        pid = forked(work)
        status = os.waitpid(pid, 0)[1]
        ended = os.WIFEXITED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        if not ended:
            encode_images(world / "images", out, config(world), num_threads=1)
        assert files(out) == wanted, step
        step += 1 if step < 6 else 3
    assert step > 12


def _text(path: Any) -> Any:
    return os.fspath(path) if isinstance(path, os.PathLike) else path


def test_killed_at_random_moments(world: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    encode_images(world / "images", tmp_path / "timed", config(world, shard_size=2))
    seconds = time.monotonic() - started
    wanted = files(tmp_path / "timed")
    draw = random.Random(0)
    for attempt in range(4):
        out = tmp_path / str(attempt)
        for _ in range(2):
            pid = forked(lambda out=out: encode_images(world / "images", out, config(world, shard_size=2)))
            time.sleep(draw.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        encode_images(world / "images", out, config(world, shard_size=2))
        assert files(out) == wanted


def test_two_processes_one_of_which_dies(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"signal 9 \(SIGKILL\).*finished shards are kept"):
        encode_images(Killer(world / "images", at=10), tmp_path / "z", config(world), processes=2)  # type: ignore[arg-type]
    done = {path.name for path in (tmp_path / "z" / "parts").glob("0*.json")}
    assert done <= {"00000.json", "00001.json"}
    encode_images(world / "images", tmp_path / "z", config(world))
    assert files(tmp_path / "z") == files(world / "whole")


@pytest.mark.parametrize(
    ("order", "names"),
    [((1, 0, 2), ("RANK", "WORLD_SIZE")), ((2, 1, 0), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))],
    ids=["torchrun", "srun"],
)
def test_processes_of_a_launcher_need_not_meet(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    order: tuple[int, ...],
    names: tuple[str, str],
) -> None:
    monkeypatch.setenv(names[1], "3")
    found = []
    for rank in order:
        monkeypatch.setenv(names[0], str(rank))
        found.append(encode_images(world / "images", tmp_path / "z", config(world)))
    assert [manifest is not None for manifest in found] == [False, False, True]
    assert files(tmp_path / "z") == files(world / "whole")
    monkeypatch.setenv(names[0], "3")
    with pytest.raises(GraftError, match="RANK=3 of WORLD_SIZE=3"):
        encode_images(world / "images", tmp_path / "z", config(world))


def test_damage_is_found_and_mended(world: Path, tmp_path: Path) -> None:
    out, wanted = tmp_path / "z", files(world / "whole")
    encode_images(world / "images", out, config(world))
    path = out / "latents-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"latents-00001.* is damaged"):
        load_dataset(out).verify()  # type: ignore[union-attr]
    encode_images(world / "images", out, config(world))
    assert files(out) == wanted
    for name in ("latents-00000.safetensors", "skipped.jsonl"):
        (out / name).unlink()
        encode_images(world / "images", out, config(world))
        assert files(out) == wanted


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seed": 1}, "vae.seed"),
        ({"flip": False}, "flip"),
        ({"size": 8}, "shape"),
        ({"mode": "mean"}, "vae.mode"),
    ],
    ids=str,
)
def test_another_job_in_the_same_folder_is_refused(world: Path, change: dict[str, Any], word: str) -> None:
    with pytest.raises(DataError, match=rf"other images or settings \(different: .*{word}"):
        encode_images(world / "images", world / "whole", config(world, **change))


def test_a_folder_of_something_else_is_left_alone(world: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"thesis\.tex"):
        encode_images(world / "images", tmp_path, config(world))
    with pytest.raises(DataError, match="already holds latents"):
        encode_images(world / "images", world / "whole", config(world), resume=False)


def test_a_full_disk_is_one_error_and_leaves_no_scraps(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("grafting.data.shards.os.fsync", full)
        with pytest.raises(DataError, match="No space left on device"):
            encode_images(world / "images", tmp_path / "z", config(world))
        assert files(tmp_path / "z") == {}
        patch.setattr("grafting.data.encoding._free", lambda folder: 1000)
        patch.undo()
    monkeypatch.setattr("grafting.data.encoding._free", lambda folder: 1000)
    with pytest.raises(DataError, match="GB are free"):
        encode_images(world / "images", tmp_path / "z", config(world))


# ---- settings and the command


@pytest.mark.parametrize(
    ("change", "word"),
    [({"size": 4}, "size=4"), ({"size": 15}, "multiple of 2"), ({"mode": "mode"}, "sample, mean"),
     ({"dtype": "int8"}, "int8"), ({"batch_size": 0}, "batch_size=0"), ({"vae": "nowhere/at/all"}, "nowhere/at/all")],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_be(world: Path, tmp_path: Path, change: dict[str, Any], word: str) -> None:
    with pytest.raises(GraftError, match=word):
        encode_images(world / "images", tmp_path / "z", config(world, **change))
    assert list(tmp_path.iterdir()) == []


def command(*words: str) -> int:
    from grafting.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["graft", "encode", *words])
        with pytest.raises(SystemExit) as stop:
            main()
    return int(stop.value.code or 0)


def test_the_command(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(world / "images"), "--out", str(tmp_path / "z"), "--vae", str(world / "vae"), "--size", "16",
             "--flip", "--shard-size", "5", "--batch-size", "4"]  # fmt: skip
    assert command(*words, "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["shards"], found["images_left"], found["shape"]) == (12, 3, 12, [4, 8, 8])
    assert found["disk_bytes"] == 12 * (2 * 2 * 4 * 8 * 8 + 16)
    assert found["seconds_left"] > 0
    assert not (tmp_path / "z").exists()
    assert command(*words, "--json") == 0
    streams = capsys.readouterr()
    found = json.loads(streams.out)
    assert (found["images"], found["skipped"]) == (11, 1)
    assert "encode 12/12" in streams.err
    assert "1 skipped" in streams.err
    assert files(tmp_path / "z") == files(world / "whole")
    assert command(*words, "--seed", "1") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_ctrl_c_keeps_what_is_finished(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from grafting.data.encoder import ShardEncoder

    encode = ShardEncoder.encode
    # A shell's background job has SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop(self: ShardEncoder, shard: int, progress: Any = None) -> Any:
        if shard == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return encode(self, shard, progress)

    with monkeypatch.context() as patch:
        patch.setattr(ShardEncoder, "encode", stop)
        words = [str(world / "images"), "--out", str(tmp_path / "z"), "--vae", str(world / "vae")]
        words += ["--size", "16", "--flip", "--shard-size", "5", "--batch-size", "4"]
        assert command(*words) == 130
    signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.endswith("error: interrupted\n")
    assert sorted(p.name for p in (tmp_path / "z").rglob("*0*")) == [
        "00000.json",
        "latents-00000.safetensors",
    ]
    with pytest.raises(DataError, match="not finished"):
        load_dataset(tmp_path / "z")
    assert preview_encoding(world / "images", tmp_path / "z", config(world))["images_left"] == 7
    assert command(*words) == 0
    assert files(tmp_path / "z") == files(world / "whole")
