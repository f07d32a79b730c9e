"""Run the relay in this process, and record by which functions it passes values on.

    python -m tests.support.call_recorder CONTROL RESULT [ARGUMENT]...

CONTROL and RESULT are the descriptors of two pipes. A line `start` begins a recording; a line
`stop` ends it, and returns the writes to sockets since then as one line of JSON. The arguments are
those of `websocket-relay`.

Each write has its *way*: the package's functions on the call stack when it was made, before them
those on the stack when the callback that made it was scheduled, and so on, back to a callback that
was not scheduled: bytes arrived, or a thread called. A function that has returned by then is not on
a stack: it calculated something, and passed nothing on. A coroutine that resumes is on the way with
all that it awaits: they return the value. Knows no function of the relay by name.

The event loop is asyncio's own, which is written in Python: uvloop's calls can't be observed. The
clock that slices of time are measured with stands still, so no slice ends early on a busy machine.
"""

import asyncio
import inspect
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, NamedTuple, cast

import uvloop

PACKAGE = f"{os.sep}websocket_relay{os.sep}"
COMPREHENSIONS = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"})
WRITES = frozenset({"write", "writelines"})
"""Methods of the transports in asyncio/selector_events.py."""


@dataclass(slots=True, eq=False)
class Turn:
    """One callback of the event loop.

    Attributes:
        cause: what scheduled it.
        resumed: the coroutines that it resumed or started first, the outermost first.
        is_resuming: whether it has called nothing else.
    """

    cause: "Handover"
    resumed: list[str] = field(default_factory=list)
    is_resuming: bool = True


class Handover(NamedTuple):
    """The stack at a moment when a value is passed on.

    Attributes:
        functions: the package's functions, the outermost first.
        turn: the callback that called them; None: it was not scheduled.
    """

    functions: list[str]
    turn: Turn | None


class Write(NamedTuple):
    """A write to a socket."""

    port: int
    data: bytes
    handover: Handover

    def as_json(self) -> dict[str, Any]:
        """Return the write, with its way: the first turn first."""
        way = [
            {"resumed": [] if turn is None else turn.resumed, "functions": functions}
            for functions, turn in _handovers_before(self.handover)
        ]
        return {"port": self.port, "data": self.data.decode("latin-1"), "way": way[::-1]}


def _handovers_before(last: Handover) -> Iterator[Handover]:
    """Yield a handover, the one that scheduled its turn, and so on."""
    present: Handover | None = last
    while present is not None:
        yield present
        present = present.turn.cause if present.turn is not None else None


class CallRecorder:
    """The writes of a recording, and the turns before them."""

    def __init__(self) -> None:
        self._writes: list[Write] | None = None
        self._of_thread = threading.local()

    def start(self) -> None:
        """Start a recording."""
        self._writes = []

    def stop(self) -> list[Write]:
        """End the recording, and return its writes."""
        writes, self._writes = self._writes or [], None
        return writes

    def caused_here(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """Return a callback whose turn is recorded as caused by the present stack."""
        if self._writes is None:
            return callback
        cause = self._present_handover()

        def run(*arguments: Any) -> Any:
            self._of_thread.turn = Turn(cause)
            try:
                return callback(*arguments)
            finally:
                self._of_thread.turn = None

        return run

    def profile(self, frame: FrameType, event: str, _: Any) -> None:
        """Observe a call or a return (`sys.setprofile`)."""
        if self._writes is None or event not in ("call", "return"):
            return
        code, turn = frame.f_code, self._turn
        if PACKAGE in code.co_filename:
            if turn is not None and turn.is_resuming:
                turn.is_resuming = event == "call" and bool(code.co_flags & inspect.CO_COROUTINE)
                if turn.is_resuming:
                    turn.resumed.append(_name_of(code))
        elif event == "call" and code.co_name in WRITES and "selector_events" in code.co_filename:
            self._record_write(frame.f_locals)

    def _record_write(self, arguments: dict[str, Any]) -> None:
        peer = cast(asyncio.Transport, arguments["self"]).get_extra_info("peername")
        data = b"".join(arguments.get("list_of_data", [arguments.get("data", b"")]))
        self.record(peer[1], data)

    def record(self, port: int, data: bytes) -> None:
        """Record a write that is made now."""
        if self._writes is not None:
            self._writes.append(Write(port, data, self._present_handover()))

    def _present_handover(self) -> Handover:
        return Handover(_functions_on_stack(sys._getframe()), self._turn)

    @property
    def _turn(self) -> Turn | None:
        return getattr(self._of_thread, "turn", None)


def _functions_on_stack(frame: FrameType | None) -> list[str]:
    """Return the package's functions on the stack above the event loop, the outermost first."""
    found: list[str] = []
    while frame is not None and frame.f_code.co_name != "_run_once":
        if PACKAGE in frame.f_code.co_filename and frame.f_code.co_name not in COMPREHENSIONS:
            found.append(_name_of(frame.f_code))
        frame = frame.f_back
    return found[::-1]


def _name_of(code: CodeType) -> str:
    """Return the name of a function, after its module if it is in no class."""
    name = code.co_qualname.replace(".<locals>", "")
    if name.lstrip("_")[0].isupper():
        return name
    module = code.co_filename.rpartition(PACKAGE)[2].removesuffix(".py")
    return f"{module.replace(os.sep, '.')}.{name}"


RECORDER = CallRecorder()


class RecordingSocket(socket.SocketType):
    """A transport's socket that is written to beside the transport."""

    def send(self, data: Any, flags: int = 0) -> int:
        """Send, and record it."""
        RECORDER.record(self.getpeername()[1], bytes(data))
        return super().send(data, flags)


class RecordingLoop(asyncio.SelectorEventLoop):
    """An event loop that records what schedules each callback."""

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        return super().call_soon(RECORDER.caused_here(callback), *args, context=context)

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        return super().call_soon_threadsafe(RECORDER.caused_here(callback), *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return super().call_at(when, RECORDER.caused_here(callback), *args, context=context)


def _serve_recordings(control: int, result: int) -> None:
    """Start and stop recordings, as the lines of a pipe request."""
    with os.fdopen(control) as lines, os.fdopen(result, "w") as results:
        for line in lines:
            writes: list[Any] = []
            if line == "start\n":
                RECORDER.start()
            else:
                writes = [write.as_json() for write in RECORDER.stop()]
            print(json.dumps(writes), file=results, flush=True)


def main() -> int:
    """Run the relay."""
    control, result, *arguments = sys.argv[1:]
    sys.argv = ["websocket-relay", *arguments]
    # The relay blocks them, too, but later: until then this thread would receive them.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    descriptors = int(control), int(result)
    threading.Thread(target=_serve_recordings, args=descriptors, daemon=True).start()
    uvloop.new_event_loop = RecordingLoop  # type: ignore[assignment]
    socket.SocketType = RecordingSocket
    time.perf_counter = lambda: 1.0
    threading.setprofile(RECORDER.profile)
    sys.setprofile(RECORDER.profile)
    from websocket_relay.__main__ import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
