"""Generated input for `fuzz.py`: for each reader, how an input is made and how it is read.

Every input is a function of (seed, reader, number).
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from damage import NUMBERS, WORDS, make_npy, make_pickle, mutate_bytes, mutate_text, mutate_tree, rezip, tree

PLANS = [
    "- replace: {target: mha, layers: interleaved-50, with: hyena_x}\n",
    "- replace: {target: mlp, layers: [0, 2], with: {mlp: {ratio: 3}}, init: random, loss: l2}\n"
    "- parallelize: {groups: pairs, merge: concat}\n",
    "version: 1\nentries:\n- replace: {target: mha, layers: '0-3:2', with: {swa: {window: 4}}, scale_by_gate: true}\n",
    '{"version": 1, "entries": [{"replace": {"target": "mha", "layers": "all", "with": "mamba2"}}]}',
]
OPTIONS = {"init": ["donor", "random"], "loss": ["l1", "l2", "huber", "auto"], "scale_by_gate": [True, False],
           "train": [True, False]}  # fmt: skip
SELECTORS = [
    "all",
    "interleaved-50",
    "8-18:2,20-27",
    "0",
    "1,2,3",
    "0-4095",
    "top-local-50",
    " deep-50 ",
    "3-1",
]
TENSOR_TYPES = [
    "F32",
    "F64",
    "F16",
    "BF16",
    "I64",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "U64",
    "I16",
    "C64",
    "F4",
    "X",
]


@dataclass
class World:
    """Valid files, and a folder of its own for each process."""

    folder: Path
    pt: list[bytes]
    safetensors: list[bytes]
    npz: list[bytes]
    manifest: dict[str, Any]
    graft_file: str
    graft_tensors: bytes
    base: Any
    meta: Any

    def path(self, name: str) -> Path:
        """A scratch file of this process."""
        import os

        folder = self.folder / str(os.getpid())
        folder.mkdir(exist_ok=True)
        return folder / name


def make_world(folder: Path) -> World:
    """Small valid files of every kind."""
    import numpy as np
    import torch
    from safetensors.torch import save

    from grafting import GraftPlan, Replace, graft, load_model, save_graft
    from grafting.formats.published import export_published
    from grafting.models.dit import DiT, DiTConfig

    torch.set_num_threads(1)
    config = DiTConfig(
        input_size=4, patch_size=2, in_channels=1, hidden_size=8, depth=2, num_heads=2, num_classes=3
    )
    base = DiT(config)
    plan = GraftPlan([Replace("mha", [1], "hyena_x"), Replace("mlp", [0], "mlp", {"ratio": 2})])
    student = graft(base, plan)
    for parameter in student.parameters():
        parameter.data = parameter.data + 0.01
    save_graft(student, folder / "graft")
    manifest = json.loads((folder / "graft/graft.json").read_text())
    tensors = next((folder / "graft").glob("*.safetensors"))
    export_published(base, folder / "base.pt")
    legacy = io.BytesIO()
    torch.save({"model": base.state_dict()}, legacy, _use_new_zipfile_serialization=False)
    plain = io.BytesIO()
    np.savez(plain, arr_0=np.zeros((6, 4, 4, 1), np.uint8), arr_1=np.arange(6), meta=np.array("{}"))
    packed = io.BytesIO()
    np.savez_compressed(packed, arr_0=np.ones((6, 1, 4, 4), np.float32), arr_1=np.arange(6), mu=np.zeros(3))
    latents = {"x": torch.zeros(6, 4, 2, 2), "y": torch.arange(6)}
    return World(
        folder, [(folder / "base.pt").read_bytes(), legacy.getvalue()],
        [save(latents, {"num_classes": "10", "name": "x"}), tensors.read_bytes()],
        [plain.getvalue(), packed.getvalue()], manifest, tensors.name, tensors.read_bytes(), base,
        load_model("arch:DiT-S/8", device="meta"),
    )  # fmt: skip


# ---- the readers


def make_plan(world: World, draw: random.Random) -> Any:
    kind = draw.randrange(12)
    if kind < 4:
        return mutate_text(draw.choice(PLANS), draw)
    if kind < 9:
        entries = [plausible_entry(draw) for _ in range(draw.choice((1, 1, 2, 3)))]
        return mutate_tree(entries, draw) if kind < 6 else entries
    kind -= 3
    if kind == 6:
        return draw.randbytes(draw.randrange(200)).decode("utf-8", "surrogateescape")
    if kind == 7:
        return json.dumps(tree(draw))
    seed = [{"replace": {"target": "mha", "layers": [1, 3], "with": {"swa": {"window": 4}}, "init": "donor"}},
            {"parallelize": {"groups": [[0, 1], [2, 3]], "merge": "concat"}}, {"prune": {"layers": [3]}}]  # fmt: skip
    return mutate_tree(seed, draw)


def plausible_entry(draw: random.Random) -> Any:
    """An entry of a plan that may well be right."""
    target = draw.choice(("mha", "mha", "mlp"))
    names = {"mha": ["hyena_x", "hyena_se", "hyena_y", "swa", "mamba2", "mha"], "mlp": ["mlp", "mlp_hyena_x"]}
    keys = {
        "mha": ["window", "kernel_size", "d_state", "expand", "head_dim"],
        "mlp": ["ratio", "kernel_size"],
    }
    config = {key: draw.choice((1, 2, 3, 4, 8, 64, *NUMBERS)) for key in keys[target] if draw.random() < 0.2}
    name = draw.choice(names[target])
    layers = draw.choice(
        ("all", "interleaved-50", "first-50", "deep-50", "0-10:2", [1, 3], [draw.randrange(13)])
    )
    entry = {"target": target, "layers": layers, "with": {name: config} if config else name}
    entry |= {key: draw.choice(values) for key, values in OPTIONS.items() if draw.random() < 0.2}
    return {"replace": entry}


def read_plan(world: World, content: Any) -> None:
    from grafting import GraftPlan, explain
    from grafting.errors import PlanError
    from grafting.yaml_io import load_yaml

    data = load_yaml(content + "\n", "plan", PlanError) if isinstance(content, str) else content
    plan = GraftPlan.from_dict(data)
    assert GraftPlan.from_dict(plan.to_dict()) == plan
    explain(world.meta, plan)


def make_selector(world: World, draw: random.Random) -> Any:
    kind = draw.randrange(8)
    if kind < 4:
        return mutate_text(draw.choice(SELECTORS), draw), draw.choice((1, 2, 7, 12, 28, 4096))
    if kind == 4:
        return "".join(draw.choice("0123456789-:, ") for _ in range(draw.randrange(1, 60))), 28
    if kind == 5:
        return [
            draw.choice((draw.randrange(-2, 30), draw.choice(NUMBERS))) for _ in range(draw.randrange(9))
        ], 28
    if kind == 6:
        return draw.randbytes(draw.randrange(40)).decode("latin-1"), draw.choice((12, 0, -1, 2**40, 1.5))
    return tree(draw), draw.choice((12, tree(draw)))


def read_selector(world: World, content: Any) -> None:
    from grafting.selectors import normalize, resolve

    selector, num_layers = content
    found = resolve(selector, num_layers, locality=[0.5] * 12 if num_layers == 12 else None)
    assert list(found) == sorted(set(found))
    assert all(0 <= layer < num_layers for layer in found)
    assert resolve(normalize(selector), num_layers, locality=[0.5] * 12) == found


def make_pt(world: World, draw: random.Random) -> bytes:
    kind = draw.randrange(10)
    data = draw.choice(world.pt)
    if kind < 4:
        return mutate_bytes(data, draw, range(1500))
    if kind == 4:
        return draw.randbytes(draw.randrange(300))
    if kind == 5:
        return mutate_bytes(data, draw, range(max(0, len(data) - 4000), len(data)))
    archive = zipfile.ZipFile(io.BytesIO(world.pt[0]))
    pickled = archive.read("archive/data.pkl")
    if kind < 9:
        pickled = mutate_bytes(pickled, draw)
    else:
        pickled = make_pickle(draw)
    return rezip(archive, {"archive/data.pkl": pickled}, draw)


def read_pt(world: World, content: bytes) -> None:
    from grafting.formats.published import import_published

    path = world.path("x.pt")
    path.write_bytes(content)
    import_published(path, num_heads=2)


def make_safetensors(world: World, draw: random.Random) -> bytes:
    data = draw.choice(world.safetensors)
    size = struct.unpack("<Q", data[:8])[0]
    kind = draw.randrange(10)
    if kind < 2:
        return mutate_bytes(data, draw, range(size + 16))
    if kind == 2:
        return struct.pack("<Q", draw.choice([n for n in NUMBERS if isinstance(n, int)]) % 2**64) + data[8:]
    if kind == 3:
        return draw.randbytes(draw.randrange(100))
    header = json.loads(data[8 : 8 + size])
    if kind < 7:
        for entry in header.values():
            if draw.random() < 0.2 and isinstance(entry, dict) and "shape" in entry:
                change = draw.randrange(4)
                if change == 0:
                    entry["shape"] = [draw.choice(NUMBERS) for _ in range(draw.randrange(5))]
                elif change == 1:
                    entry["dtype"] = draw.choice(TENSOR_TYPES)
                elif change == 2:
                    entry["data_offsets"] = [draw.choice(NUMBERS), draw.choice(NUMBERS)]
                else:
                    entry["shape"] = [draw.choice([0, *NUMBERS]), 0]
    else:
        header = mutate_tree(header, draw)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if kind == 9:
        text = mutate_text(text.decode(), draw).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data[8 + size :][: draw.choice((10**9,) * 5 + (0, 40))]


def read_safetensors(world: World, content: bytes) -> None:
    from grafting.data import load_dataset
    from grafting.errors import GraftError
    from grafting.formats import weights

    path = world.path("x.safetensors")
    path.write_bytes(content)
    refused = None
    for read in (weights.read_safetensors, load_dataset):
        try:
            read(path)
        except GraftError as error:
            refused = error
    if refused:
        raise refused


def make_graft(world: World, draw: random.Random) -> Any:
    kind = draw.randrange(12)
    if kind < 8:
        return json.dumps(mutate_tree(world.manifest, draw)).encode("utf-8", "surrogatepass")
    if kind == 8:  # the tensors are right and the architecture is not
        manifest = json.loads(json.dumps(world.manifest))
        key = draw.choice(list(manifest["architecture"]))
        manifest["architecture"][key] = draw.choice([*NUMBERS, *WORDS, None, [], {}])
        return json.dumps(manifest).encode("utf-8", "surrogatepass")
    if kind == 9:
        manifest = json.loads(json.dumps(world.manifest))
        manifest["plan"] = mutate_tree(mutate_tree(manifest["plan"], draw), draw)
        return json.dumps(manifest).encode("utf-8", "surrogatepass")
    if kind == 10:
        return mutate_text(json.dumps(world.manifest), draw).encode("utf-8", "surrogatepass")
    return draw.randbytes(draw.randrange(200))


def read_graft(world: World, content: bytes) -> None:
    from grafting import load_graft

    folder = world.path("graft")
    if not (folder / world.graft_file).exists():
        folder.mkdir()
        (folder / world.graft_file).write_bytes(world.graft_tensors)
    (folder / "graft.json").write_bytes(content)
    load_graft(folder, base=world.base)


def make_npz(world: World, draw: random.Random) -> bytes:
    data = draw.choice(world.npz)
    kind = draw.randrange(10)
    if kind < 3:
        return mutate_bytes(data, draw, range(200))
    if kind == 3:
        return mutate_bytes(data, draw, range(max(0, len(data) - 400), len(data)))
    if kind == 4:
        return draw.randbytes(draw.randrange(300))
    archive = zipfile.ZipFile(io.BytesIO(data))
    changes = {}
    for name in archive.namelist():
        if draw.random() < 0.5:
            changes[name] = make_npy(archive.read(name), draw)
    return rezip(archive, changes, draw)


def read_npz(world: World, content: bytes) -> None:
    from grafting.data import load_dataset
    from grafting.errors import GraftError
    from grafting.evaluation.samples import SampleFile

    path = world.path("x.npz")
    path.write_bytes(content)
    refused = None

    def sample_file(path: Path) -> None:
        SampleFile.open(path).content_hash()

    for read in (sample_file, load_dataset):
        try:
            read(path)
        except GraftError as error:
            refused = error
    if refused:
        raise refused


Make = Callable[[World, random.Random], Any]
Read = Callable[[World, Any], None]
READERS: dict[str, tuple[Make, Read]] = {
    "plan": (make_plan, read_plan), "selector": (make_selector, read_selector), "pt": (make_pt, read_pt),
    "safetensors": (make_safetensors, read_safetensors), "graft": (make_graft, read_graft), "npz": (make_npz, read_npz),
}  # fmt: skip
