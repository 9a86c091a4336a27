"""Damage for `inputs.py`: bytes, text, JSON data, pickles and archives changed at random."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zipfile
from typing import Any

NUMBERS = [0, 1, -1, 2, 3, 7, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**12,
           10**40, -(2**63), 0.5, -0.0, 1e308, 1e-320]  # fmt: skip
WORDS = ["all", "interleaved-50", "interleaved-75", "first-50", "deep-50", "top-local-50", "low-local-50", "mha", "mlp",
         "hyena_x", "hyena_se", "hyena_y", "swa", "mamba2", "mlp_hyena_x", "replace", "parallelize", "prune", "target",
         "layers", "with", "init", "loss", "random", "donor", "ratio", "window", "kernel_size", "d_state", "expand",
         "head_dim", "groups", "pairs", "merge", "concat", "version", "entries", "scale_by_gate", "train", "l1", "auto",
         "../../etc/passwd", "<script>alert(1)</script>", "\u202e", "\x00", "'", "{}", "é", "\U0001f600", "!!python/x",
         "&a [*a]", "*a", "0-3", "8-18:2,20-27", "1-2:0", "NaN", ".inf", "1e400", "null", "true", "", " "]  # fmt: skip
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
