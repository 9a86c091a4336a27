"""Feed generated input to everything that reads what strangers wrote; only GraftError may come back.

    python scripts/chaos/fuzz.py                        # every reader, 50,000 inputs each
    python scripts/chaos/fuzz.py --only npz pt --num 2000 --seed 7 --keep folder

An input is a damaged or rewritten valid one (bytes flipped, cut, repeated, numbers made absurd; the structure of
headers, pickles and JSON rewritten) or noise. Each runs in a fork with a time limit and a limit of memory; a fork
that crashes, hangs or grows is a finding, and so is any exception but GraftError. Prints a JSON object; exit status 1
if there was a finding.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from inputs import READERS, World, make_world

SECONDS = 10.0  # for one input
MEGABYTES = 512  # of growth over all inputs of a fork
BATCH = 2_500  # inputs of one fork


def main() -> None:
    """Parse, feed, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num", type=int, default=50_000, help="inputs of each reader")
    parser.add_argument("--only", nargs="*", choices=sorted(READERS), default=sorted(READERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="write inputs that were a finding here")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        world = make_world(Path(scratch))
        for name in options.only:
            found[name] = feed(name, world, options.num, options.seed, options.keep)
            print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
    print(json.dumps(found, indent=2))
    raise SystemExit(1 if any(result["findings"] for result in found.values()) else 0)


def feed(name: str, world: World, num: int, seed: int, keep: Path | None) -> dict[str, Any]:
    """`num` inputs to one reader, in forks; its figures and findings."""
    started = time.monotonic()
    result: dict[str, Any] = {"inputs": 0, "accepted": 0, "refused": 0, "slowest_ms": 0.0, "growth_mb": 0.0,
                              "findings": []}  # fmt: skip
    first = 0
    while first < num:
        last = min(first + BATCH, num)
        part = in_fork(lambda report, a=first, b=last: batch(name, world, seed, a, b, report), last - first)
        for key in ("inputs", "accepted", "refused"):
            result[key] += part[key]
        for key in ("slowest_ms", "growth_mb"):
            result[key] = max(result[key], part[key])
        first += part["inputs"]
        result["findings"] += part["findings"]
        if len(result["findings"]) > 20:
            break
    result["seconds"] = round(time.monotonic() - started, 1)
    for number, finding in enumerate(result["findings"]):
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            make, _ = READERS[name]
            content = make(world, random.Random(f"{seed}/{name}/{finding['input']}"))
            (keep / f"{name}-{number}.pickle").write_bytes(pickle.dumps((finding, content)))
    return result


def batch(name: str, world: World, seed: int, first: int, last: int, report: Callable[[Any], None]) -> None:
    """Inputs `first` to `last` of one reader, in this process; reports each before and after."""
    import warnings

    from grafting.errors import GraftError

    make, read = READERS[name]
    before = peak_mb()
    for number in range(first, last):
        content = make(world, random.Random(f"{seed}/{name}/{number}"))
        report(("begin", number))
        started, outcome, text = time.monotonic(), "accepted", ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                read(world, content)
        except GraftError as error:
            outcome, text = "refused", str(error)
            if "\n" in text or len(text) > 2000:
                outcome, text = "finding", f"an error of {len(text)} characters: {text[:200]!r}"
        except Exception:
            outcome, text = "finding", traceback.format_exc()[-1500:]
        report(("end", outcome, text if outcome == "finding" else "", time.monotonic() - started))
        if peak_mb() - before > MEGABYTES:
            report(("end", "finding", f"memory grew by {peak_mb() - before:.0f} MB", 0.0))
            break
    report(("done", peak_mb() - before))


def in_fork(work: Callable[[Callable[[Any], None]], None], num: int) -> dict[str, Any]:
    """Run a batch in a fork under limits, and follow it; a fork that dies or stalls is a finding of its last input."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_AS, (virtual_bytes() + (8 << 30),) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with os.fdopen(writer, "wb", buffering=0) as pipe:
            try:
                work(lambda message: pipe.write(pickle.dumps(message)))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os._exit(0)
    os.close(writer)
    part: dict[str, Any] = {"inputs": 0, "accepted": 0, "refused": 0, "slowest_ms": 0.0, "growth_mb": 0.0,
                            "findings": []}  # fmt: skip
    current, ended = -1, False
    for message in messages(reader, process):
        if message[0] == "begin":
            current = message[1]
            part["inputs"] += 1
        elif message[0] == "end":
            _, outcome, text, seconds = message
            part["slowest_ms"] = max(part["slowest_ms"], round(1000 * seconds, 1))
            if outcome == "finding":
                part["findings"].append({"input": current, "what": text})
            else:
                part[outcome] += 1
        elif message[0] == "done":
            part["growth_mb"], ended = round(message[1], 1), True
        else:
            part["findings"].append({"input": current, "what": message[1]})
    _, status = os.waitpid(process, 0)
    if not ended and not part["findings"]:
        part["findings"].append(
            {"input": current, "what": f"the process ended with {os.waitstatus_to_exitcode(status)}"}
        )
    part["inputs"] = max(part["inputs"], 1)
    return part


def messages(reader: int, process: int) -> Iterator[Any]:
    """What a fork reports; after `SECONDS` of processor time without a word it is killed."""
    import select

    buffer = b""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        silent_since = cpu_seconds(process)
        while True:
            ready, _, _ = select.select([pipe], [], [], 1.0)
            if ready:
                piece = pipe.read(1 << 16)
                if not piece:
                    return
                buffer += piece
                silent_since = cpu_seconds(process)
                while buffer:
                    end = buffer.find(b".") + 1
                    while end:
                        try:
                            message = pickle.loads(buffer[:end])
                            break
                        except Exception:
                            end = buffer.find(b".", end) + 1
                    if not end:
                        break
                    buffer = buffer[end:]
                    yield message
            elif cpu_seconds(process) - silent_since > SECONDS:
                os.kill(process, signal.SIGKILL)
                yield ("hang", f"no answer in {SECONDS:.0f} s")


def cpu_seconds(process: int) -> float:
    """Processor time of a process, so that a busy machine is not taken for a hang."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mb() -> float:
    """The most memory that this process has had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


def virtual_bytes() -> int:
    """The address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
