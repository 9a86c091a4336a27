"""What a weight file of a stranger may claim, checked before or right after it is read: no file costs more than it is.

Every function raises CheckpointError with the reason alone; the reader adds the file.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from grafting.errors import CheckpointError

MAX_HEADER_BYTES = 1 << 25  # of safetensors: names, shapes and offsets of some 100,000 tensors
MAX_PICKLE_BYTES = 1 << 26
MAX_OBJECTS = 1_000_000
MAX_DIMENSION = 1 << 20
MAX_SIDE = 4096  # of a latent: 32,768 pixels at a factor of 8
_MAX_MEMBERS = 1_000_000
_SLACK = 1 << 20
_ALIASES = 4  # tied weights are stored once and counted for each name
_NUM_LEGACY = 5  # pickles at the start of a file of the old form: magic, version, system, objects, storages
_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_MARK = -1


def check_pickle(path: Path) -> None:
    """Of a `.pt` file: that no member unpacks to more than is stored, and that its pickles build no giants."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            for number in range(_NUM_LEGACY):
                if number and not file.read(1):
                    return
                file.seek(file.tell() - (1 if number else 0))
                _check_size(file)
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > _MAX_MEMBERS:
            raise CheckpointError(f"it has {len(members)} members")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError("it has compressed members, which PyTorch does not write")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise CheckpointError("its members claim more bytes than the file has")
        for member in members:
            if member.filename.endswith("data.pkl"):
                if member.file_size > MAX_PICKLE_BYTES:
                    raise CheckpointError(f"its objects take {member.file_size} bytes")
                with archive.open(member) as pickle:
                    _check_size(pickle)


def check_safetensors(path: Path) -> None:
    """That the header is of a size that it can have."""
    with path.open("rb") as file:
        claimed = int.from_bytes(file.read(8), "little")
    if claimed > min(MAX_HEADER_BYTES, path.stat().st_size - 8):
        raise CheckpointError(f"its header claims {claimed} bytes")


def check_tensors(content: Any, num_bytes: int) -> None:
    """That every tensor in (nested) content is plain and all together are no more than a file of `num_bytes` holds."""
    waiting, seen, total = [content], set(), 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            check_tensor(value)
            total += value.numel() * value.element_size()
            if total > _ALIASES * num_bytes + _SLACK:
                raise CheckpointError(f"its tensors are more than {_ALIASES} times the file")
        elif isinstance(value, (Mapping, list, tuple, set, frozenset)) and id(value) not in seen:
            seen.add(id(value))
            if len(seen) > MAX_OBJECTS:
                raise CheckpointError(f"it holds more than {MAX_OBJECTS} objects")
            waiting.extend(value.values() if isinstance(value, Mapping) else value)


def check_architecture(architecture: Mapping[str, Any], num_tensors: int) -> None:
    """That a model as described can be of a file of so many tensors, and has a position table that can be made."""
    for key, value in architecture.items():
        if isinstance(value, (int, float)) and not abs(value) <= MAX_DIMENSION:
            raise CheckpointError(f"its architecture has {key}={value:.3g}, which no model has")
    depth = max(
        (n for key in ("depth", "num_layers") if isinstance(n := architecture.get(key), int)), default=0
    )
    if depth > num_tensors:
        raise CheckpointError(f"its architecture has {depth} blocks, its file {num_tensors} tensors")
    given = architecture.get("latent_size")
    sides = [given[0], given[-1]] if isinstance(given, list) and given else [
        n for key in ("input_size", "sample_size") if isinstance(n := architecture.get(key), int)
    ] * 2  # fmt: skip
    if any(not isinstance(side, int) or not 0 < side <= MAX_SIDE for side in sides):
        raise CheckpointError(
            f"its architecture has samples of size {str(sides)[:60]}, expected at most {MAX_SIDE}"
        )


def check_tensor(tensor: Tensor) -> None:
    """That a tensor is what it seems: dense, on the CPU, of a usual type, no larger than its storage."""
    kind = type(tensor)
    if kind not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_nested:
        raise CheckpointError(
            f"it holds a {kind.__name__} of layout {tensor.layout}, expected plain dense tensors"
        )
    if tensor.dtype not in _DTYPES or tensor.device.type != "cpu":
        raise CheckpointError(f"it holds a tensor of type {tensor.dtype} on {tensor.device}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"it holds a tensor that claims shape {list(tensor.shape)} of a smaller storage"
        )


def _check_size(file: IO[bytes]) -> None:
    """Follow a pickle without building anything, and count what each tuple would hold if it were written out.

    Tuples are hashed through and through when they are keys; a few dozen that each hold the one before twice
    would take for ever.
    """
    stack: list[int] = []
    memo: dict[int, int] = {}

    def pop(count: int) -> int:
        taken = [stack.pop() for _ in range(min(count, len(stack)))]
        return sum(max(0, size) for size in taken)

    def pop_to_mark() -> int:
        size = 0
        while stack and (top := stack.pop()) != _MARK:
            size += top
        return size

    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name == "MARK":
            stack.append(_MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else int(argument or 0)] = stack[-1] if stack else 0
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo.get(int(argument or 0), 0))
        elif name == "DUP":
            stack.append(stack[-1] if stack else 0)
        else:
            before, after = opcode.stack_before, opcode.stack_after
            marked = pickletools.markobject in before
            size = pop_to_mark() if marked else 0
            size += pop(len(before) - 2 if marked else len(before))
            if size > MAX_OBJECTS:
                raise CheckpointError(f"it holds an object of more than {MAX_OBJECTS} parts")
            keeps = opcode.stack_after and name not in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")
            stack.extend([size + 1 if keeps else 0] * len(after))
        if len(memo) > MAX_OBJECTS or len(stack) > MAX_OBJECTS:
            raise CheckpointError(f"it holds more than {MAX_OBJECTS} objects")
