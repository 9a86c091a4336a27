"""Tensors in and out of files without executing anything, and their fingerprints."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from grafting.errors import CheckpointError

# JSON and whole files are read and written without PyTorch: `graft status` does not wait for it.
if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Tensors: TypeAlias = "dict[str, Tensor]"


def read_pickled(path: Path, *, mapped: bool = False) -> Any:
    """The content of a `.pt` file by PyTorch's restricted unpickler, which builds tensors and plain data only.

    `argparse.Namespace` (the published files keep their arguments in one) is admitted: it is inert. Raises
    CheckpointError for anything else, for a damaged or empty file, and for one that would unpack to more than it is.
    mapped: tensors are the file's own pages, which processes share and the system may drop; where a file system can't
    do that, they are read. Whoever keeps one copies it: on a network a page of a file that is gone ends the process.
    """
    import torch

    from grafting.formats.limits import check_pickle, check_tensors

    _check_file(path)
    try:
        check_pickle(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about old forms of files; the error that follows says enough
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except RuntimeError as error:
                if not mapped or "unable to mmap" not in str(error):
                    raise
                content = torch.load(path, map_location="cpu", weights_only=True)
        check_tensors(content, path.stat().st_size)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        for marker in ("WeightsUnpickler error: ", "Weights only load failed."):
            if marker in str(error):
                reason = "it holds objects that are not tensors or plain data, and nothing of it was executed"
        raise CheckpointError(
            f"can't read weights from {str(path)!r}: {reason[:200]}; expected a whole PyTorch "
            "checkpoint of plain tensors; if it was copied, copy it again"
        ) from None
    return content


def read_safetensors(path: Path) -> Tensors:
    """All tensors of a `.safetensors` file. Raises CheckpointError for a missing, damaged or absurd one."""
    from safetensors.torch import load_file

    from grafting.formats.limits import check_safetensors, check_tensors

    _check_file(path)
    try:
        check_safetensors(path)
        tensors = load_file(path)
        check_tensors(tensors, path.stat().st_size)
    except BaseException as error:
        if (
            not isinstance(error, Exception) and type(error).__name__ != "PanicException"
        ):  # of the Rust reader
            raise
        raise CheckpointError(
            f"can't read weights from {str(path)!r}: {str(error)[:200]}; expected a whole safetensors file"
        ) from None
    return tensors


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file of ours. Raises CheckpointError."""
    from grafting.yaml_io import load_json

    data = load_json(path, what, CheckpointError)
    if not isinstance(data, dict):
        raise CheckpointError(f"{what} {str(path)!r} holds a {type(data).__name__}, expected a JSON object")
    return data


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, lasting: bool = True
) -> None:  # fmt: skip
    """Write tensors whole or not at all (temporary file, fsync, rename); lasting: as `new_file` has it."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with new_file(path, lasting=lasting) as file:
        file.write(save(plain, dict(metadata) if metadata else None))


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all, keys in the given order."""
    write_bytes(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all. Raises CheckpointError where the folder can't be written."""
    with new_file(path) as file:
        file.write(content)


@contextmanager
def new_file(path: Path, *, lasting: bool = True) -> Iterator[IO[bytes]]:
    """A file to write to that takes its name, on disk for good, when the block ends; after an error nothing is left.

    Temporary file beside it, fsync, rename, fsync of the folder. lasting: False for what can be made again, and is
    checked when it is read: the disk writes it in its time. Raises CheckpointError for an error of the disk.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                if lasting:
                    os.fsync(file.fileno())
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
        if lasting:
            _sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"can't write {str(path)!r}: {error.strerror or error}") from None


def is_partial(path: Path) -> bool:
    """Whether it is a file that was being written when its process ended."""
    return path.name.startswith(".") and path.suffix in (".tmp", ".partial") and not path.is_symlink()


def clear_partial(folder: Path) -> None:
    """Remove files of `folder` that were never finished; for the holder of its lock, since a writer has such too."""
    for path in folder.glob(".*"):
        if is_partial(path):
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename last; systems that can't do that for a folder are left to do it in their time."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 (hex) of dtype, shape and bytes."""
    import torch

    flat = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{flat.dtype}{list(flat.shape)}".encode())
    digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digests(model: nn.Module) -> dict[str, str]:
    """The digest of every tensor of the state dict; empty on the meta device."""
    state = model.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        return {}
    return {name: tensor_digest(tensor) for name, tensor in state.items()}


def combined_digest(by_name: Mapping[str, str]) -> str:
    """One SHA-256 (hex) for a whole state dict."""
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(by_name.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError that names the first tensor with a NaN or an infinity."""
    import torch

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{where}: tensor {name!r} holds values that are not finite")


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Change the type of all that is stored, in place; fixed tables, which are not, keep theirs."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module._buffers.items():
            stored = name not in module._non_persistent_buffers_set
            if buffer is not None and stored and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    return model


def check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError unless names and shapes are those of `own` (which may be on the meta device)."""
    missing = [name for name in own if name not in tensors]
    unexpected = [name for name in tensors if name not in own]
    if missing or unexpected:
        parts = [f"{len(names)} {what} (first {names[0][:200]!r})" for what, names in
                 (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
        raise CheckpointError(f"{where}: the tensors do not fit the model: {', '.join(parts)}")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise CheckpointError(
                f"{where}: tensor {name!r} has shape {list(tensors[name].shape)}, the model needs {list(tensor.shape)}"
            )


def load_strictly(
    model: nn.Module, tensors: Mapping[str, Tensor], where: str, *, assign: bool = False
) -> None:
    """Load a whole state dict; every missing, unexpected or misshapen tensor is an error that names it.

    assign: the tensors themselves become the model's (for a model that was built without memory).
    """
    check_fit(model.state_dict(), tensors, where)
    check_finite(tensors, where)
    model.load_state_dict(dict(tensors), assign=assign)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"no file {str(path)!r}: give the path of a weight file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"the file {str(path)!r} is empty: it was not copied or written to its end")
