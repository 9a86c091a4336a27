"""The entry point: exit statuses, and one line on stderr for what a user can mend."""

from __future__ import annotations

import signal
import sys
from types import FrameType

import typer

from grafting.cli.app import app


def main() -> None:
    """Entry point: one line on stderr for what a user can mend, exit statuses as documented."""
    from grafting.errors import GraftError
    from grafting.training.loop import Interrupted

    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer's own answer to Ctrl-C
            raise KeyboardInterrupt
    except GraftError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except Interrupted as stop:
        print(f"error: {stop}", file=sys.stderr)
        raise SystemExit(stop.code) from None
    except _Terminated:
        print("error: terminated", file=sys.stderr)
        raise SystemExit(143) from None
    except (KeyboardInterrupt, typer.Abort):
        print("error: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("click", "typer"):  # newer typers carry click inside
            raise
        describe = getattr(error, "format_message", None)
        message = str(describe() if describe else error)
        if message:
            print(f"error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        signal.signal(signal.SIGTERM, previous)
    raise SystemExit(code if isinstance(code, int) else 0)


class _Terminated(BaseException):
    """SIGTERM outside of a training stage (which stops by itself): what is half written is taken back."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated
