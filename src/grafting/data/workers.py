"""Several processes that encode: the parent hands out shards over a pipe each; a worker that dies ends the rest."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from grafting.cores import usable_cores
from grafting.data.encoder import EncodeConfig, ShardEncoder
from grafting.data.image_source import ImageSource
from grafting.data.latent_folder import LatentFolder
from grafting.errors import DataError, GraftError
from grafting.processes import own_device

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

_READY, _IMAGES, _DONE, _ERROR = "ready", "images", "done", "error"
_GRACE_SECONDS = 10.0


def encode_in_processes(
    source: ImageSource,
    config: EncodeConfig,
    device: str,
    folder: LatentFolder,
    shards: list[int],
    processes: int,
    num_threads: int | None,
    progress: Callable[[int, int], None],
) -> None:
    """Encode `shards` into `folder` in several processes of this machine.

    Raises the error of the first worker that has one (`DataError` if it was killed), once all others have ended.
    """
    context = multiprocessing.get_context("spawn")
    count = min(processes, len(shards))
    threads = num_threads or max(1, min(16, usable_cores() // count))
    workers: dict[Connection, SpawnProcess] = {}
    waiting = deque(shards)
    try:
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, source, config, device, rank, str(folder.path), threads)
            )
            process.start()
            theirs.close()  # so that the end of the worker is the end of the pipe
            workers[ours] = process
        busy = dict(workers)
        while busy:
            for pipe in wait(list(busy)):
                if not isinstance(pipe, Connection):
                    continue
                try:
                    kind, *values = pipe.recv()
                    if kind in (_READY, _DONE):
                        shard = waiting.popleft() if waiting else None
                        pipe.send(shard)
                        if shard is None:
                            del busy[pipe]
                except (EOFError, OSError):  # also of one that was killed between its word and ours
                    process = workers[pipe]
                    process.join(_GRACE_SECONDS)
                    raise DataError(_death(process.exitcode)) from None
                if kind == _ERROR:
                    raise _error(*values)
                if kind == _IMAGES:
                    progress(*values)
    except BaseException:
        for process in workers.values():
            process.terminate()
        raise
    finally:
        for pipe, process in workers.items():
            process.join(_GRACE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()


def _work(
    pipe: Connection,
    source: ImageSource,
    config: EncodeConfig,
    device: str,
    rank: int,
    out: str,
    threads: int,
) -> None:
    """A worker: asks for a shard, encodes and writes it, until there is none or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    from grafting.data.pixels import quiet_decoding
    from grafting.loading import as_device

    try:
        where = as_device(own_device(device, rank))
        encoder = ShardEncoder(source, config, where, threads)
        folder = LatentFolder(out)
        pipe.send((_READY,))
        with quiet_decoding():
            while (shard := pipe.recv()) is not None:
                result = encoder.encode(shard, lambda num, skipped: pipe.send((_IMAGES, num, skipped)))
                folder.write(shard, encoder.span(shard), *result)
                pipe.send((_DONE,))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone: what is finished stays
    except GraftError as error:
        pipe.send((_ERROR, type(error).__name__, str(error)))


def _error(name: str, text: str) -> GraftError:
    """A worker's error, of its own class."""
    import grafting.errors as errors

    found: Any = getattr(errors, name, DataError)
    return found(text)


def _death(code: int | None) -> str:
    how = f"by signal {-code} ({signal.Signals(-code).name})" if code and code < 0 else f"with status {code}"
    return (
        f"an encoding process ended {how}; finished shards are kept: start again to go on, with fewer --processes if "
        "memory ran out"
    )
