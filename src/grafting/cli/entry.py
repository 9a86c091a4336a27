"""The entry point: exit statuses, and one line on stderr for what a user can mend."""

from __future__ import annotations

import atexit
import gc
import signal
import sys
from types import FrameType

import typer

from grafting.cli.app import app
from grafting.cores import limit_threads
from grafting.errors import GraftError, Interrupted, OutOfMemoryError, PeerError
from grafting.out_of_memory import said_of
from grafting.processes import is_lost, leave, settle


def main() -> None:
    """Entry point: one line on stderr for what a user can mend, exit statuses as documented."""
    # What lives at the end dies with the process, and need not be looked through for cycles (half a second of torch).
    atexit.register(gc.freeze)
    limit_threads()
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer's own answer to Ctrl-C
            raise KeyboardInterrupt
    except GraftError as error:
        raise _end(str(error), error.exit_code, lost=isinstance(error, PeerError)) from None
    except Interrupted as stop:
        raise _end(str(stop), stop.code) from None
    except _Terminated:
        raise _end("terminated", 143) from None
    except (KeyboardInterrupt, typer.Abort):
        raise _end("interrupted", 130) from None
    except Exception as error:
        if is_lost(error):
            raise _end("another process of this run has ended", PeerError.exit_code, lost=True) from None
        if (said := said_of(error)) is not None:
            raise _end(f"out of memory: {said}", OutOfMemoryError.exit_code) from None
        if type(error).__module__.split(".")[0] not in ("click", "typer"):  # newer typers carry click inside
            settle(1, f"{type(error).__name__}: {error}")
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # not a mistake: its message is the help
            sys.stdout.write(f"{getattr(error, 'message', error)}\n")
            raise SystemExit(2) from None
        describe = getattr(error, "format_message", None)
        raise _end(str(describe() if describe else error), 2) from None
    finally:
        signal.signal(signal.SIGTERM, previous)
    leave()
    raise SystemExit(code if isinstance(code, int) else 0)


def _end(message: str, code: int, *, lost: bool = False) -> SystemExit:
    """The exit of this process; of several, the first to fail prints the line."""
    code, speaks = settle(code, message, lost=lost)
    if message and speaks:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return SystemExit(code)


class _Terminated(BaseException):
    """SIGTERM outside of a training stage (which stops by itself): what is half written is taken back."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated
