"""The start of the `masksolve` command, before anything heavy is imported, so that an interrupt ends it cleanly."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

_INTERRUPTED = 130


def main() -> int:
    """Run the command and return its exit code, as `masksolve.cli.main` does.

    Whenever SIGINT comes, the command ends with one line. Standard streams may be closed.
    """
    _fill_closed_streams()
    # A background job ignores it, and goes on doing so.
    can_be_interrupted = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        if can_be_interrupted:
            # An interrupt within an import cannot be caught: libraries take it for a dependency that is missing.
            signal.signal(signal.SIGINT, _end_while_importing)
        from masksolve import cli

        if can_be_interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = cli.main()
        if can_be_interrupted:
            # All is said, and what is finished is on the disk: from here on Python only waits for threads.
            signal.signal(signal.SIGINT, lambda *_: os._exit(code))
        return code
    except KeyboardInterrupt:  # between two of these lines
        _say_interrupted()
        return _INTERRUPTED


def _end_while_importing(*_: Any) -> None:
    _say_interrupted()
    os._exit(_INTERRUPTED)


def _say_interrupted() -> None:
    os.write(2, b"masksolve: interrupted; nothing was written\n")


def _fill_closed_streams() -> None:
    """Put the null device where a standard stream is closed: the next file opened would get its number."""
    try:
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)
    except OSError:  # no null device, as in some sandboxes
        return
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (it stays open)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


if __name__ == "__main__":
    sys.exit(main())
