"""What a process meets from outside: signals, and readers of its output that go away. Imports nothing slow."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from types import FrameType
from typing import Any, TextIO, cast


class Stop:
    """Ctrl-C and SIGTERM, while it is entered. Before there is work they end the program at once; at work the first
    asks to stop, which keeps what is finished, and the second aborts; after it they change nothing.

    A terminal that is closed (SIGHUP) stops nothing.
    """

    def __init__(self, program: bool = False) -> None:
        """A `program` ends by itself, without a traceback from whatever is being imported; else KeyboardInterrupt."""
        self._program = program
        self._phase = "before"
        self._signal = 0
        self._replaced: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Somebody wants it to stop."""
        return self._signal != 0

    @property
    def code(self) -> int:
        """The exit code that says so: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self._signal or signal.SIGINT)

    def ask(self) -> None:
        """Stops as the first Ctrl-C does."""
        self._signal = signal.SIGINT

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            handlers: dict[str, Any] = {"SIGINT": self._handle, "SIGTERM": self._handle, "SIGHUP": signal.SIG_IGN}
            for number, handler in ((getattr(signal, name, None), each) for name, each in handlers.items()):
                if number is not None:
                    self._replaced[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._replaced.items():  # a program's end is not to be interrupted
            signal.signal(number, signal.SIG_IGN if self._program else before or signal.SIG_DFL)

    @contextmanager
    def working(self) -> Iterator[None]:
        """There is something to be finished."""
        self._phase = "working"
        try:
            yield
        finally:
            self._phase = "after"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._phase == "after":
            return
        at_once = self.asked or self._phase == "before"
        self._signal = number
        if not at_once:
            return
        if self._program and self._phase == "before":
            if "--json" in sys.argv:
                _write(1, '{"error": "aborted"}\n')
            _write(2, "accdiff: aborted\n")
            os._exit(self.code)
        raise KeyboardInterrupt


def _write(descriptor: int, text: str) -> None:
    with suppress(OSError):
        os.write(descriptor, text.encode())


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


class _Lasting:
    """A stream of text whose reader may go away, or that may not be there: what is written then is lost."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream: Any = _Nowhere() if stream is None else stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        """What waits in the stream's buffer goes nowhere either."""
        if isinstance(error, UnicodeError):
            raise error
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        self._stream = _Nowhere()


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Whoever reads stdout and stderr may go away; the pictures are still wanted."""
    streams = [cast(TextIO, _Lasting(stream)) for stream in (sys.stdout, sys.stderr)]
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()


def prepare_streams() -> None:
    """At a program's start: a descriptor that is closed would be the next file's, and get what libraries print; and
    what a terminal or pipe cannot encode must not end a run."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
