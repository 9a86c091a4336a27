"""Generated input for `fuzz.py`: for each reader, how an input is made and how it is read.

Every input is a function of (seed, reader, number).
"""

from __future__ import annotations

import io
import json
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUMBERS = [0, 1, -1, 2, 3, 7, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**12,
           10**40, -(2**63), 0.5, -0.0, 1e308, 1e-320]  # fmt: skip
WORDS = ["all", "interleaved-50", "interleaved-75", "first-50", "deep-50", "top-local-50", "low-local-50", "mha", "mlp",
         "hyena_x", "hyena_se", "hyena_y", "swa", "mamba2", "mlp_hyena_x", "replace", "parallelize", "prune", "target",
         "layers", "with", "init", "loss", "random", "donor", "ratio", "window", "kernel_size", "d_state", "expand",
         "head_dim", "groups", "pairs", "merge", "concat", "version", "entries", "scale_by_gate", "train", "l1", "auto",
         "../../etc/passwd", "<script>alert(1)</script>", "\u202e", "\x00", "'", "{}", "é", "\U0001f600", "!!python/x",
         "&a [*a]", "*a", "0-3", "8-18:2,20-27", "1-2:0", "NaN", ".inf", "1e400", "null", "true", "", " "]  # fmt: skip
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
TYPES = [
    "<f4",
    "<f8",
    "|u1",
    "<i8",
    ">f4",
    "|b1",
    "<U9",
    "|O",
    "|V8",
    "<U999999999",
    "<f16",
    "<c8",
    "<M8[ns]",
    "|S3",
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


# ---- generic mutation


def mutate_bytes(data: bytes, draw: random.Random, where: range | None = None) -> bytes:
    """A few flips, cuts, repetitions and overwritten integers, by preference in `where`."""
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 3, 8, 40))):
        span = where if where and draw.random() < 0.7 else range(max(1, len(content)))
        at = draw.randrange(span.start, max(span.start + 1, min(span.stop, len(content) or 1)))
        kind = draw.randrange(6)
        if kind == 0 and content:
            content[min(at, len(content) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[at : at + draw.choice((1, 2, 4, 8))] = draw.randbytes(draw.choice((1, 2, 4, 8)))
        elif kind == 2:
            value = draw.choice([n for n in NUMBERS if isinstance(n, int)]) % 2**64
            size = draw.choice((2, 4, 8))
            content[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, draw.choice(("little", "big")))
        elif kind == 3:
            del content[at : at + draw.choice((1, 3, 17, 400, 10**6))]
        elif kind == 4:
            content[at:at] = content[at : at + draw.choice((1, 4, 64))] * draw.choice((1, 2, 50))
        else:
            content[at:at] = draw.choice(WORDS).encode("utf-8", "surrogatepass")
    return bytes(content)


def mutate_text(text: str, draw: random.Random) -> str:
    """Characters and tokens of a text replaced, repeated, nested, removed."""
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.randrange(len(text) + 1)
        kind = draw.randrange(6)
        piece = draw.choice((draw.choice(WORDS), str(draw.choice(NUMBERS)), chr(draw.randrange(1, 0xD800))))
        if kind == 0:
            text = text[:at] + piece + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + draw.choice((1, 2, 9, 60)) :]
        elif kind == 2:
            text = text[:at] + text[max(0, at - 9) : at] * draw.choice((1, 2, 300)) + text[at:]
        elif kind == 3:
            text = (
                text[:at] + draw.choice("[]{}:,-&*!|>%@`\"'#?\n\t ") * draw.choice((1, 1, 2, 500)) + text[at:]
            )
        elif kind == 4:
            text = text[:at] + piece + text[at + len(piece) :]
        else:
            words = text.split(" ")
            draw.shuffle(words)
            text = " ".join(words)
    return text


def tree(draw: random.Random, depth: int = 0) -> Any:
    """Any JSON data."""
    kind = draw.randrange(8 if depth < 5 else 5)
    if kind < 2:
        return draw.choice(WORDS)
    if kind == 2:
        return draw.choice(NUMBERS)
    if kind == 3:
        return draw.choice((None, True, False))
    if kind == 4:
        return draw.randrange(-3, 12)
    if kind == 5:
        return {draw.choice(WORDS): tree(draw, depth + 1) for _ in range(draw.randrange(4))}
    return [tree(draw, depth + 1) for _ in range(draw.randrange(4))]


def mutate_tree(data: Any, draw: random.Random) -> Any:
    """JSON data with some values exchanged, dropped or doubled, at any depth."""
    if draw.random() < 0.04:
        return tree(draw, 2)
    if isinstance(data, dict):
        found = {key: mutate_tree(value, draw) for key, value in data.items() if draw.random() > 0.02}
        if draw.random() < 0.04:
            found[draw.choice(WORDS)] = tree(draw, 2)
        return found
    if isinstance(data, list):
        found_list = [mutate_tree(value, draw) for value in data if draw.random() > 0.02]
        return found_list * draw.choice((1,) * 20 + (2, 40))
    if draw.random() < 0.06:
        return draw.choice([*NUMBERS, *WORDS, None, True, [], {}])
    return data


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


def make_pickle(draw: random.Random) -> bytes:
    """Opcodes in any order; sometimes tuples that double thirty times over."""
    if draw.random() < 0.3:
        body = b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(draw.randrange(2, 40)))
        return b"\x80\x02}q\xfe" + body + draw.choice((b"K\x01s.", b"s.", b"0."))
    codes = [
        bytes([code])
        for code in b"()]}.tabdehjlnpqrstu0123cRNIKJMGXUBQPVSFLY\x80\x85\x86\x87\x88\x89\x8a\x8b\x81\x94"
    ]
    body = b"".join(
        draw.choice(codes) + draw.randbytes(draw.choice((0, 0, 1, 4))) for _ in range(draw.randrange(1, 60))
    )
    return b"\x80\x02" + body + b"."


def rezip(archive: zipfile.ZipFile, changes: dict[str, bytes], draw: random.Random) -> bytes:
    """The archive with members replaced; sometimes compressed, renamed or a bomb of zeros."""
    out = io.BytesIO()
    method = draw.choice((zipfile.ZIP_STORED,) * 6 + (zipfile.ZIP_DEFLATED,))
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as target:
        warnings.simplefilter("ignore")  # about a name that is there twice
        for name in archive.namelist():
            content = changes.get(name, archive.read(name))
            if draw.random() < 0.01:
                content = bytes(draw.choice((0, 1, 10**6)))
            if draw.random() < 0.01:
                name = draw.choice(["../../x", "/etc/x", "archive/data/999", name + "x"])
            target.writestr(zipfile.ZipInfo(name), content, method)
    return out.getvalue()


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


def make_npy(data: bytes, draw: random.Random) -> bytes:
    """An array with a rewritten header."""
    if draw.random() < 0.2:
        return mutate_bytes(data, draw, range(128))
    if draw.random() < 0.05:
        return b"\x93NUMPY\x02\x00" + struct.pack("<I", draw.choice((2**32 - 1, 2**20, 9))) + data[10:]
    shape = tuple(draw.choice((draw.randrange(9), draw.choice(NUMBERS))) for _ in range(draw.randrange(6)))
    header: Any = {
        "descr": draw.choice(TYPES),
        "fortran_order": draw.choice((False, False, True, 3)),
        "shape": shape,
    }
    if draw.random() < 0.2:
        header = mutate_tree({**header, "shape": list(shape)}, draw)
    text = repr(header)
    if draw.random() < 0.2:
        text = mutate_text(text, draw)
    if draw.random() < 0.05:
        text = draw.choice(("(" * 3000, "[" * 9000, "-" * 9000, "1" * 9999, "{" * 200, "'\\d'", "9L"))
    raw = text.encode("latin-1", "replace") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw) % 65536) + raw + data[128:]


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
