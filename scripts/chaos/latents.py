"""Kill `graft encode` again and again and compare what it leaves with an uninterrupted run.

    python scripts/chaos/latents.py --kills 25 --images 96

Images and a tiny random VAE are generated. Each attempt is a process of its own that gets SIGKILL after a random
share of the time a whole run takes; the next attempt goes on in the same folder, and when one comes to its end a new
folder is begun, until so many were killed. Prints one JSON object; exit status 1 if any file differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from latent_tools import files, save_images, save_vae

from grafting.data import EncodeConfig, encode_images


def attempt(root: Path, out: Path, config: EncodeConfig, seconds: float) -> bool:
    """Encode in a child that is killed after so long; says whether it was."""
    pid = os.fork()
    if pid == 0:
        encode_images(root / "images", out, config, num_threads=1)
        os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--shard-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        vae = save_vae(root / "vae")
        damaged = save_images(root / "images", per_class=-(-given.images // 3)) / "bee" / "001.JPEG"
        damaged.write_bytes(damaged.read_bytes()[:300])
        config = EncodeConfig(vae=str(vae), size=16, shard_size=given.shard_size, batch_size=4, flip=True)
        started = time.monotonic()
        whole = encode_images(root / "images", root / "whole", config, num_threads=1)
        seconds = time.monotonic() - started
        assert whole is not None
        wanted, kills, finished, different, inside = files(root / "whole"), 0, 0, 0, 0
        while kills < given.kills:
            out = root / f"out-{finished}"
            while kills < given.kills and attempt(root, out, config, draw.uniform(0, seconds)):
                kills += 1
                inside += any(out.rglob("*.partial"))
            encode_images(root / "images", out, config, num_threads=1)
            finished += 1
            different += files(out) != wanted
    found = {
        "kills": kills, "of_them_inside_a_write": inside, "folders": finished, "different": different,
        "images": whole.num, "skipped": whole.num_skipped, "shards": len(whole.shards), "sha256": whole.sha256,
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()
