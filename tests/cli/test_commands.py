"""listen, send and bench, as somebody types them: what they print, and how they end."""

import asyncio
import base64
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from xml.etree import ElementTree

import pytest
import websockets
from websocket_relay.cli.bench.clients import BenchClient, BenchMessage, control_frame, frame_head
from websocket_relay.cli.bench.summary import BenchLoad, BenchResult, table
from websocket_relay.cli.bench.tally import Latencies, Tally
from websocket_relay.client import MAX_MESSAGE_BYTES
from websockets.asyncio.client import ClientConnection

from tests.support.issuer import SECRET, token
from tests.support.proxy import Proxy
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import (
    PACKAGE,
    POLL_S,
    Finished,
    Relay,
    StartRelay,
    environment,
    path_of,
    receive,
    run_command,
    run_python,
)

JWT = {"mode": "jwt", "jwt": {"secret": SECRET}}
BRIEF = ("--clients", "4", "--publishers", "2", "--duration", "0.3", "--warmup", "0.1")


class Command:
    """A command that runs: what it reads, prints and says."""

    def __init__(self, process: "asyncio.subprocess.Process") -> None:
        self.process = process

    async def line(self) -> str:
        """Return the next line that it prints."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            return (await self.process.stdout.readline()).decode()

    async def note(self) -> str:
        """Return the next line that it says on standard error."""
        assert self.process.stderr is not None
        async with asyncio.timeout(PATIENCE_S):
            return (await self.process.stderr.readline()).decode()

    async def note_with(self, words: str) -> str:
        """Return the next line on standard error that has these words."""
        while words not in (line := await self.note()):
            assert line, f"it ended without {words!r}"
        return line

    async def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        await self.process.stdin.drain()

    async def end(self) -> Finished:
        """Type no more, and wait for its end."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        async with asyncio.timeout(PATIENCE_S):
            stdout, stderr = await self.process.communicate()
        code = self.process.returncode
        assert code is not None
        return Finished(code, (stdout or b"").decode(), (stderr or b"").decode())


@asynccontextmanager
async def running(
    *arguments: str,
    env: dict[str, str] | None = None,
    stdin: int = PIPE,
    stdout: int = PIPE,
    stderr: int = PIPE,
) -> AsyncIterator[Command]:
    """Run a command with a keyboard that a test types on."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "websocket_relay", *arguments,
        stdin=stdin, stdout=stdout, stderr=stderr,
        env=environment({"no_proxy": "*"} | (env or {})),
    )  # fmt: skip
    try:
        yield Command(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def typed(
    *arguments: str, reading: bytes = b"", env: dict[str, str] | None = None
) -> Finished:
    """Run a command on an input that ends."""
    async with running(*arguments, env=env) as command, asyncio.timeout(PATIENCE_S):
        stdout, stderr = await command.process.communicate(reading)
        code = command.process.returncode
    assert code is not None
    return Finished(code, stdout.decode(errors="surrogateescape"), stderr.decode())


@asynccontextmanager
async def listening(url: str, *arguments: str, stdout: int = PIPE) -> AsyncIterator[Command]:
    """Run `listen` and wait until it hears."""
    async with running("listen", *arguments, url, stdout=stdout) as command:
        await command.note_with("connected to")
        yield command


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Open a terminal: its screen, and what a program has in its place."""
    screen, inside = pty.openpty()
    try:
        yield screen, inside
    finally:
        os.close(screen)
        os.close(inside)


async def unread(pipe: int, size: int) -> None:
    """Wait until a pipe holds so many bytes that nobody has read."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)
            if found == size:
                return
            await asyncio.sleep(POLL_S)


def url_of(relay: Relay, channel: str) -> str:
    return relay.ws_url(f"/channels/{channel}")


async def say(client: ClientConnection, *messages: str | bytes) -> None:
    for message in messages:
        await client.send(message)


# listen


async def test_listen_prints_one_message_a_line_at_once(relay: Relay, channel: str) -> None:
    async with listening(url_of(relay, channel)) as command, relay.client(channel) as other:
        for text in ("hello", "", "grüße"):
            await other.send(text)
            assert await command.line() == f"{text}\n"


async def test_listen_writes_json_that_says_everything(relay: Relay, channel: str) -> None:
    url = url_of(relay, channel)
    async with listening(url, "--json", "--count", "2") as command:
        async with relay.client(channel) as other:
            await say(other, "two\nlines", b"\x00\xff")
        done = await command.end()
    text, binary = map(json.loads, done.stdout.splitlines())
    assert (text["text"], base64.b64decode(binary["base64"])) == ("two\nlines", b"\x00\xff")
    assert done.exit_code == 0
    again = await typed("listen", "--since", text["position"], "--count", "1", "--json", url)
    assert json.loads(again.stdout) == binary
    last = await typed("listen", "--history", "2", "--count", "2", url)
    assert last.stdout == "two\nlines\n\x00\udcff"


async def test_listen_ends_after_so_many_messages(relay: Relay, channel: str) -> None:
    async with listening(url_of(relay, channel), "--count", "2") as command:
        async with relay.client(channel) as other:
            await say(other, "one", "two", "three")
        done = await command.end()
    assert (done.exit_code, done.stdout) == (0, "one\ntwo\n")


async def test_listen_keeps_a_terminal_from_obeying_what_strangers_say(
    relay: Relay, channel: str
) -> None:
    with terminal() as (screen, inside):
        url = url_of(relay, channel)
        async with listening(url, "--count", "2", stdout=inside) as command:
            async with relay.client(channel) as other:
                await say(other, "\x1b]0;gotcha\x07 and more", b"12345")
            assert (await command.end()).exit_code == 0
        shown = os.read(screen, 4096).decode()
    assert shown == "\\x1b]0;gotcha\\x07 and more\r\n[5 bytes]\r\n"


async def test_listen_comes_back_and_prints_what_it_missed(relay: Relay, channel: str) -> None:
    async with Proxy(relay.port) as proxy, relay.client(channel) as other:
        url = proxy.url(path_of(channel))
        async with listening(url) as command:
            await say(other, "before")
            assert await command.line() == "before\n"
            proxy.cut()
            assert "connection lost; retrying in 0." in await command.note()
            await say(other, "meanwhile")
            assert await command.line() == "meanwhile\n"
            assert await command.note() == f"websocket-relay: connected to {url}\n"


async def test_listen_says_what_a_draining_relay_said_and_waits_for_another(
    relay_with: StartRelay, channel: str
) -> None:
    old = relay_with(shutdown={"spread_s": 0})
    async with Proxy(old.port) as proxy, listening(proxy.url(path_of(channel))) as command:
        new = relay_with()
        assert await old.stop() == 0
        assert "closed by the relay: draining; retry_ms=" in await command.note()
        proxy.target = new.port
        assert "missed" in await command.note_with("connected to")  # memory:// forgets
        async with new.client(channel) as other:
            await other.send("on the new one")
        assert await command.line() == "on the new one\n"


async def test_listen_ends_well_when_its_reader_has_had_enough_though_nothing_comes(
    relay: Relay, channel: str
) -> None:
    reading, writing = os.pipe()
    async with listening(url_of(relay, channel), stdout=writing) as command:
        os.close(writing)
        os.close(reading)
        assert await command.end() == Finished(0, "", "")


async def test_listen_ends_well_when_its_reader_has_had_enough(relay: Relay, channel: str) -> None:
    url = url_of(relay, channel)
    async with relay.client(channel) as other:
        for number in range(2_000):
            await other.send(str(number))
            await receive(other)
    command = f"{sys.executable} -m websocket_relay listen --history 2000 {url} | head -n 2"
    done = await asyncio.to_thread(
        subprocess.run,
        ["bash", "-o", "pipefail", "-c", command],
        env=environment({"no_proxy": "*"}),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "0\n1\n")
    assert done.stderr == f"websocket-relay: connected to {url}\n"


async def test_listen_says_that_it_cannot_write(relay: Relay, channel: str) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    async with listening(url_of(relay, channel), stdout=full) as command:
        os.close(full)
        async with relay.client(channel) as other:
            await other.send("no room for it")
        done = await command.end()
    line = "websocket-relay: standard output: No space left on device\n"
    assert (done.exit_code, done.stderr) == (1, line)


async def test_listen_ends_quietly_with_ctrl_c(relay: Relay, channel: str) -> None:
    before = await relay.metric("websocket_closes_total", code="1000")
    async with listening(url_of(relay, channel)) as command:
        command.process.send_signal(signal.SIGINT)
        assert await command.end() == Finished(130, "", "")
    await relay.metric_is("websocket_closes_total", before + 1, code="1000")


async def test_ctrl_c_ends_the_waiting_for_a_relay(channel: str) -> None:
    async with running("listen", "--patience", "60", "ws://127.0.0.1:1/") as command:
        await command.note_with("connection refused; retrying in")
        command.process.send_signal(signal.SIGINT)
        assert (await command.end()).exit_code == 130


async def test_quiet_leaves_the_notes_out(relay: Relay, channel: str) -> None:
    done = await typed("send", "--quiet", url_of(relay, channel), "hello")
    assert done == Finished(0, "", "")


# send


async def test_send_sends_a_message(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as other:
        done = await typed("send", url_of(relay, channel), "hello, everybody")
        assert (done.exit_code, done.stdout) == (0, "")
        assert await receive(other) == "hello, everybody"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\n\r\nlast", ["one", "", "last"]),
        (b"", []),
        ("grüße\n".encode(), ["grüße"]),
    ],
)
async def test_send_sends_every_line_it_reads(
    relay: Relay, channel: str, text: bytes, lines: list[str]
) -> None:
    async with relay.client(channel) as other:
        assert (await typed("send", url_of(relay, channel), reading=text)).exit_code == 0
        await other.send("the end")
        assert [await receive(other) for _ in range(len(lines) + 1)] == [*lines, "the end"]


async def test_send_sends_a_line_as_soon_as_it_is_typed(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as other, running("send", url_of(relay, channel)) as command:
        for text in ("one", "two"):
            await command.type(f"{text}\n")
            assert await receive(other) == text


async def test_send_sends_a_file_or_its_input_as_one_binary_message(
    relay: Relay, channel: str, tmp_path: Path
) -> None:
    content = bytes(range(256)) * 1_000
    file = tmp_path / "picture"
    file.write_bytes(content)
    url = url_of(relay, channel)
    async with relay.client(channel) as other:
        assert (await typed("send", "--binary", str(file), url)).exit_code == 0
        assert (await typed("send", "--binary", "-", url, reading=content)).exit_code == 0
        assert [await receive(other), await receive(other)] == [content, content]


async def test_send_sends_a_long_stream_through_a_restart(
    relay_with: StartRelay, channel: str
) -> None:
    old, new = relay_with(shutdown={"spread_s": 0}), relay_with()
    async with Proxy(old.port) as proxy, running("send", proxy.url(path_of(channel))) as command:
        await command.type("one\n" * 2_000)
        await old.metric_reaches("websocket_messages_total", 100)
        proxy.target = new.port
        assert await old.stop() == 0
        await command.type("two\n" * 2_000)
        done = await command.end()
    assert done.exit_code == 0, done.stderr
    assert await new.metric("websocket_messages_total") >= 2_000


async def test_send_says_how_much_it_does_not_know_of(relay: Relay, channel: str) -> None:
    async with Proxy(relay.port) as proxy, running("send", proxy.url(path_of(channel))) as command:
        await command.note_with("connected to")
        proxy.mute()
        await command.type("one\n")
        await proxy.has_lost_something()
        proxy.cut()
        await command.note_with("connection lost; retrying in")
        done = await command.end()
    assert done.exit_code == 1
    shown = proxy.url(path_of(channel))
    why = "1 message unconfirmed: connection lost"
    assert done.error_lines[-1] == f"websocket-relay: {shown}: {why}"


async def test_send_ends_when_the_relay_is_gone_though_nobody_types(
    relay: Relay, channel: str
) -> None:
    async with Proxy(relay.port) as proxy:
        url = proxy.url(path_of(channel))
        async with running("send", "--patience", "0", url) as command:
            await command.note_with("connected to")
            proxy.target = None
            proxy.cut()
            async with asyncio.timeout(PATIENCE_S):
                assert await command.process.wait() == 1


async def test_send_ends_with_ctrl_c_while_it_waits_for_the_keyboard(
    relay: Relay, channel: str
) -> None:
    async with running("send", url_of(relay, channel)) as command:
        await command.note_with("connected to")
        command.process.send_signal(signal.SIGINT)
        async with asyncio.timeout(PATIENCE_S):
            assert await command.process.wait() == 130


async def test_send_refuses_what_is_no_text(relay: Relay, channel: str, tmp_path: Path) -> None:
    done = await typed("send", "-q", url_of(relay, channel), reading=b"one\n\xff\n")
    assert done.exit_code == 2
    assert done.stderr == "websocket-relay: line 2 is not UTF-8; --binary sends any bytes\n"
    missing = tmp_path / "picture"
    done = await typed("send", "-q", "--binary", str(missing), url_of(relay, channel))
    assert done.exit_code == 1
    assert done.stderr == f"websocket-relay: {missing}: No such file or directory\n"


async def test_send_refuses_what_no_relay_would_take_without_keeping_all_of_it(
    relay: Relay, channel: str, tmp_path: Path
) -> None:
    file, url = tmp_path / "film", url_of(relay, channel)
    with file.open("wb") as opened:
        opened.truncate(MAX_MESSAGE_BYTES * 1_000)  # takes no room on the disk
    done = await typed("send", "-q", "--binary", str(file), url)
    words = f"{file}: a message has at most 67,108,864 bytes"
    assert done == Finished(2, "", f"websocket-relay: {words}\n")
    with file.open("rb") as opened:
        async with running("send", "-q", url, stdin=opened.fileno()) as command:
            done = await command.end()
    assert done == Finished(2, "", "websocket-relay: line 1 has more than 67,108,864 bytes\n")


async def test_send_ends_with_ctrl_c_while_it_reads_a_binary_message(
    relay: Relay, channel: str
) -> None:
    async with running("send", "--binary", "-", url_of(relay, channel)) as command:
        await command.type("so far")
        assert command.process.stdin is not None
        await unread(command.process.stdin.get_extra_info("pipe").fileno(), 0)
        command.process.send_signal(signal.SIGINT)
        async with asyncio.timeout(PATIENCE_S):
            assert await command.process.wait() == 130


# bench


async def test_bench_ends_with_a_table_that_the_relay_s_own_figures_bear_out(
    relay_with: StartRelay, channel: str, tmp_path: Path
) -> None:
    relay = relay_with()
    written, drawn = tmp_path / "bench.json", tmp_path / "bench.svg"
    outputs = ("--json", str(written), "--plot", str(drawn))
    done = await typed(
        "bench", *BRIEF, "--warmup", "0", "--rate", "200", *outputs, url_of(relay, channel)
    )
    assert (done.exit_code, done.stderr) == (0, "")
    figures = json.loads(written.read_text())
    assert figures["sent"] >= 40
    assert figures["deliveries"] == 4 * figures["sent"]
    assert (figures["missing"], figures["closed"]) == (0, {})
    relayed = await relay.metric("websocket_messages_total")
    assert figures["sent"] <= relayed <= figures["sent"] + 2  # due before the clock was started
    latency = figures["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"] < 10_000
    rows = {line.rpartition("  ")[0].split("  ")[0]: line for line in done.stdout.splitlines()}
    assert f"{figures['sent']:,}" in done.stdout
    assert {"messages", "deliveries", "missing", "latency p50", "latency p99"} <= rows.keys()
    assert ElementTree.parse(drawn).getroot().tag.endswith("svg")


async def test_bench_with_a_window_goes_as_fast_as_it_goes(relay: Relay, channel: str) -> None:
    done = await typed("bench", *BRIEF, "--window", "2", "--bytes", "70000", url_of(relay, channel))
    assert (done.exit_code, done.stderr) == (0, "")
    assert "2 in flight each, 70,000 bytes each" in done.stdout


async def test_bench_over_tls_with_tokens(
    tls_relay_with: StartRelay, channel: str, certificate_directory: Path
) -> None:
    relay = tls_relay_with(auth=JWT)
    trust = ("--ca", str(certificate_directory / "cert.pem"))
    url, env = url_of(relay, channel), {"RELAY_TOKEN": token()}
    done = await typed("bench", *BRIEF, *trust, url, env=env)
    assert (done.exit_code, done.stderr) == (0, "")


async def test_bench_says_that_clients_were_closed_and_what_is_missing(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_messages_per_s": 5})
    done = await typed("bench", *BRIEF, "--warmup", "0", "--rate", "400", url_of(relay, channel))
    assert done.exit_code == 1
    closed, missing = done.error_lines
    assert closed == "websocket-relay: 2 clients were closed: rate limit (1008)"
    assert missing.endswith("deliveries are missing")


async def test_bench_shows_its_progress_to_a_terminal(relay: Relay, channel: str) -> None:
    with terminal() as (screen, inside):
        async with running("bench", *BRIEF, url_of(relay, channel), stderr=inside) as command:
            done = await command.end()
        shown = os.read(screen, 65_536).decode()
    assert done.exit_code == 0
    assert "deliveries/s  p50 " in shown
    assert "warming up" in shown
    assert max(map(len, shown.split("\r\x1b[K"))) < 80
    assert shown.endswith("\r\x1b[K")
    assert "latency p50" in done.stdout


async def test_bench_tells_what_it_has_when_ctrl_c_ends_it(relay: Relay, channel: str) -> None:
    url = url_of(relay, channel)
    options = (*BRIEF, "--duration", "60", "--warmup", "0", "--rate", "100")
    before = await relay.metric("websocket_messages_total")
    async with running("bench", *options, url) as command:
        await relay.metric_reaches("websocket_messages_total", before + 20)
        command.process.send_signal(signal.SIGINT)
        done = await command.end()
    assert (done.exit_code, done.stderr) == (130, "")
    assert "latency p50" in done.stdout


async def test_bench_tells_before_it_measures_that_it_cannot_write(
    relay: Relay, channel: str, tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "not there" / "bench.json")
    done = await typed("bench", *BRIEF, "--json", nowhere, url_of(relay, channel))
    assert done == Finished(1, "", f"websocket-relay: {nowhere}: No such file or directory\n")


async def test_bench_says_why_it_was_not_let_in(relay_with: StartRelay, channel: str) -> None:
    url = url_of(relay_with(limits={"max_connections": 3}), channel)
    done = await typed("bench", *BRIEF, url)
    assert done.exit_code == 1
    assert done.stderr == f"websocket-relay: {url}: HTTP 503, too many connections\n"


class Wire(asyncio.Transport):
    """Stands for a socket: keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_read = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.is_read = False

    def resume_reading(self) -> None:
        self.is_read = True


@pytest.mark.parametrize("message_bytes", [20, 125, 126, 65_535, 65_536])
@pytest.mark.parametrize("piece", [1, 7, 100_000])
async def test_a_bench_client_counts_its_messages_however_they_arrive_and_no_others(
    message_bytes: int, piece: int
) -> None:
    if piece * 2_000 < message_bytes:
        piece = 5_000
    tally, form = Tally(start_ns=1), BenchMessage.of(message_bytes)
    echoes: list[int] = []
    client = BenchClient(7, b"", form, tally, lambda _, count: echoes.append(count))
    wire = Wire()
    client.connection_made(wire)
    client.data_received(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n")

    def message(sender: int, due_ns: int, mark: bytes = form.mark) -> bytes:
        stamp = due_ns.to_bytes(8) + sender.to_bytes(4)
        return form.head + (mark + stamp).ljust(message_bytes, b"x")

    now_ns = time.perf_counter_ns()
    stream = b"".join(
        (
            message(7, now_ns),
            frame_head(2, 3, masked=False) + b"foo",
            message(8, now_ns) + message(7, now_ns),
            message(7, now_ns, b"somebody"),
            frame_head(1, 200, masked=False) + b"t" * 200,
            b"\x89\x02hi",
            message(7, 0),  # before the start
            message(9, now_ns),
        )
    )
    for at in range(0, len(stream), piece):
        client.data_received(stream[at : at + piece])
    assert tally.deliveries == 4
    assert sum(echoes) == 3
    assert sum(tally.latencies.counts) == 4
    assert wire.written[:2] == control_frame(0xA, b"hi")[:2]  # the ping was answered
    await asyncio.sleep(0)
    assert wire.is_read  # again, where much came at once


@pytest.mark.parametrize(
    ("cpu_share", "late_ms", "sent", "words"),
    [
        (0.95, 1.0, 1_000, "This client was the bottleneck"),
        (0.5, 20.0, 1_000, "This client was late itself"),
        (0.5, 1.0, 900, "The relay did not accept 100 messages a second."),
        (0.5, 1.0, 1_000, "own delay p99"),
    ],
)
def test_the_table_says_whose_the_figures_are(
    cpu_share: float, late_ms: float, sent: int, words: str
) -> None:
    load = BenchLoad(10, 1, 100, 0, 128, 10.0, 0.0)
    tally = Tally(start_ns=1, sent=sent, deliveries=sent * 10)
    tally.latencies.note(10_000_000)
    tally.close(0.0)
    last = table("ws://relay/", BenchResult(load, tally, 10.0, cpu_share, late_ms)).splitlines()[-1]
    assert last.startswith(words)


def test_quantiles_are_right_to_one_percent() -> None:
    latencies = Latencies()
    for micros in range(1, 10_001):
        latencies.note(micros * 1_000)
    for share, exact in ((0.5, 5.0), (0.9, 9.0), (0.99, 9.9)):
        assert latencies.quantile_ms(share) == pytest.approx(exact, rel=0.011)
    assert latencies.summary_ms()["max"] == 10.0
    assert Latencies().quantile_ms(0.5) is None


# What goes wrong: one line, the right status

AWAY = "ws://127.0.0.1:1/channels/news"
EVERY: Sequence[tuple[str, ...]] = (("listen",), ("send", "-q"), ("bench", *BRIEF))


def with_url(command: Sequence[str], url: str, *further: str) -> list[str]:
    return [*command, *further, url, *(["hello"] if command[0] == "send" else [])]


@pytest.mark.parametrize("command", EVERY, ids=lambda command: command[0])
async def test_no_relay_is_one_line_and_1(command: Sequence[str]) -> None:
    done = await typed(*with_url(command, AWAY))
    assert done == Finished(1, "", f"websocket-relay: {AWAY}: connection refused\n")


@pytest.mark.parametrize("command", EVERY, ids=lambda command: command[0])
async def test_ctrl_c_ends_a_command_that_is_still_being_loaded(
    command: Sequence[str], tmp_path: Path
) -> None:
    (tmp_path / "websockets.py").write_text("import signal; signal.raise_signal(signal.SIGINT)\n")
    path = f"{tmp_path}{os.pathsep}{environment()['PYTHONPATH']}"
    done = await typed(*with_url(command, AWAY), env={"PYTHONPATH": path})
    assert done == Finished(130, "", "")


async def test_another_ctrl_c_ends_a_command_that_hangs(relay: Relay, channel: str) -> None:
    reading, writing = os.pipe()
    async with listening(url_of(relay, channel), stdout=writing) as command:
        os.close(writing)
        async with relay.client(channel) as other:
            await other.send("x" * 200_000)
            await unread(reading, 65_536)  # and no more, so it waits to write the rest
        # Not by send_signal: that looks for the end itself, and asyncio may miss it then (255).
        with suppress(ProcessLookupError):
            while command.process.returncode is None:
                os.kill(command.process.pid, signal.SIGINT)
                await asyncio.sleep(POLL_S)
        done = await command.end()
        os.close(reading)
    assert done.exit_code in {130, -signal.SIGINT}  # a shell makes 130 of both
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("command", EVERY, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("localhost:8443/secret", "scheme isn't ws or wss"),
        ("http://localhost/secret", "scheme isn't ws or wss"),
        ("ws://:1/", "hostname isn't provided"),
    ],
)
async def test_a_wrong_address_is_one_line_and_2(
    command: Sequence[str], url: str, why: str
) -> None:
    done = await typed(*with_url(command, url))
    line = "not a channel URL such as ws://localhost:8443/channels/news: "
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"websocket-relay: {line}")
    assert done.stderr.endswith(f"{why}\n")


@pytest.mark.parametrize("command", EVERY, ids=lambda command: command[0])
async def test_a_refused_token_is_one_line_and_1_and_never_shown(
    relay_with: StartRelay, channel: str, command: Sequence[str], tmp_path: Path
) -> None:
    relay = relay_with(auth=JWT)
    url = url_of(relay, channel)
    without = await typed(*with_url(command, url))
    assert without == Finished(1, "", f"websocket-relay: {url}: HTTP 401, token required\n")
    bad = token(exp=1)
    file = tmp_path / "token.txt"
    file.write_text(f"{bad}\n")
    for done in (
        await typed(*with_url(command, f"{url}?access_token={bad}")),
        await typed(*with_url(command, url), env={"RELAY_TOKEN": bad}),
        await typed(*with_url(command, url, "--token-file", str(file))),
    ):
        why = "HTTP 401, invalid token: expired"
        assert done == Finished(1, "", f"websocket-relay: {url}: {why}\n")
    file.write_text(token())
    sent = await typed("send", "--token-file", str(file), url, "hello")
    assert sent.exit_code == 0


@pytest.mark.parametrize("command", EVERY, ids=lambda command: command[0])
async def test_a_token_file_without_a_token_is_one_line_and_2(
    command: Sequence[str], tmp_path: Path
) -> None:
    file = tmp_path / "token.txt"
    named = with_url(command, AWAY, "--token-file", str(file))
    missing = await typed(*named)
    assert missing == Finished(2, "", f"websocket-relay: {file}: No such file or directory\n")
    file.write_text("\n")
    empty = await typed(*named)
    assert empty == Finished(2, "", f"websocket-relay: {file}: contains no token\n")


@pytest.mark.parametrize("command", EVERY, ids=lambda command: command[0])
async def test_a_certificate_is_trusted_when_it_is_named(
    tls_relay_with: StartRelay,
    channel: str,
    command: Sequence[str],
    certificate_directory: Path,
) -> None:
    relay = tls_relay_with()
    url, ca = url_of(relay, channel), str(certificate_directory / "cert.pem")
    done = await typed(*with_url(command, url))
    assert done.exit_code == 1
    (line,) = done.error_lines
    assert line.startswith(f"websocket-relay: {url}: certificate not trusted: self")
    assert line.endswith("; trust its authority with --ca FILE")
    if command[0] != "listen":
        assert (await typed(*with_url(command, url, "--ca", ca))).exit_code == 0
    key = str(certificate_directory / "key.pem")
    done = await typed(*with_url(command, url, "--ca", key))
    assert done == Finished(2, "", f"websocket-relay: {key}: contains no certificate\n")
    done = await typed(*with_url(command, AWAY, "--ca", ca))
    line = "--ca requires a wss:// URL"
    assert done == Finished(2, "", f"websocket-relay: {line}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["listen"],
        ["listen", "--count", "0", AWAY],
        ["listen", "--count", "x", AWAY],
        ["listen", "--since", "1-0-0", "--history", "3", AWAY],
        ["listen", "--patience", "-1", AWAY],
        ["send", "--binary", "f", AWAY, "message"],
        ["bench", "--bytes", "19", AWAY],
        ["bench", "--duration", "0", AWAY],
        ["bench", "--rate", "1", "--window", "1", AWAY],
    ],
)
def test_bad_usage_ends_with_2_and_says_why(tmp_path: Path, arguments: list[str]) -> None:
    done = run_command(*arguments, directory=tmp_path)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.error_lines[-1].startswith(f"websocket-relay {arguments[0]}: error: ")


AS_ON_WINDOWS = """
import signal, sys
sys.modules |= dict.fromkeys(["resource", "uvloop"])
del signal.pthread_sigmask, signal.sigwait
from websocket_relay.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("arguments", [("--help",), ("listen", "--help"), ("bench", "--help")])
def test_commands_start_without_modules_that_windows_does_not_have(
    tmp_path: Path, arguments: Sequence[str]
) -> None:
    done = run_python("-c", AS_ON_WINDOWS, *arguments, directory=tmp_path)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("usage: ")


def test_a_command_does_not_wait_for_a_server_to_be_imported(tmp_path: Path) -> None:
    code = (
        "import sys, websocket_relay.cli.main as cli;"
        "print({'asyncio', 'websockets'} & {*sys.modules});"
        "cli._parser(); print({'fastapi', 'uvicorn', 'pydantic'} & {*sys.modules})"
    )
    done = run_python("-c", code, directory=tmp_path)
    assert (done.exit_code, done.stdout) == (0, "set()\nset()\n"), done.stderr


@pytest.fixture
def client_only(tmp_path: Path) -> Callable[..., Finished]:
    """Run the command line where of all packages only the client's are installed."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for package in (PACKAGE, Path(websockets.__path__[0])):
        (packages / package.name).symlink_to(package)

    def run(*arguments: str) -> Finished:
        env = {"PYTHONPATH": str(packages)}
        return run_python("-S", "-m", "websocket_relay", *arguments, directory=tmp_path, env=env)

    return run


@pytest.mark.parametrize("command", ["listen", "send", "bench"])
def test_the_client_s_commands_need_no_package_of_the_relay(
    client_only: Callable[..., Finished], command: str
) -> None:
    done = client_only(command, "ws://127.0.0.1:1/", "--help")
    assert (done.exit_code, done.stderr) == (0, "")


async def test_a_client_only_installation_sends(
    relay: Relay, channel: str, client_only: Callable[..., Finished]
) -> None:
    url = relay.ws_url(f"/channels/{channel}")
    sent = await asyncio.to_thread(client_only, "send", url, "hello")
    assert sent.exit_code == 0, sent.stderr


@pytest.mark.parametrize("command", [[], ["serve"], ["check"], ["healthcheck"], ["dev-cert"]])
def test_a_command_of_the_relay_says_which_extra_is_missing(
    client_only: Callable[..., Finished], command: list[str]
) -> None:
    done = client_only(*command)
    assert done.exit_code == 1
    assert "pip install 'websocket-relay[server]'" in done.stderr
    assert len(done.error_lines) == 1


@pytest.mark.parametrize("command", ["listen", "send", "bench"])
def test_the_help_has_examples_and_says_how_it_ends(tmp_path: Path, command: str) -> None:
    done = run_command(command, "--help", directory=tmp_path)
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"  websocket-relay {command} " in done.stdout.partition("examples:")[2]
    assert "Exit status: 0 done" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert command in run_command("--help", directory=tmp_path).stdout
