"""`listen`, `send`, `bench` and `verify`: what they print, and how they end."""

import asyncio
import base64
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import websockets
from websocket_relay.cli.bench.clients import BenchClient, BenchMessage
from websocket_relay.cli.bench.summary import BenchLoad, BenchResult, table
from websocket_relay.cli.bench.tally import Latencies, Tally
from websocket_relay.client.connection import MAX_MESSAGE_BYTES
from websockets.asyncio.client import ClientConnection
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from tests.support.client_commands import (
    NO_PROXY,
    RunningCommand,
    pseudo_terminal,
    run_client,
    running,
)
from tests.support.issuer import SECRET, sign_token
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import (
    PACKAGE,
    POLL_S,
    CommandResult,
    RelayProcess,
    StartRelay,
    environment,
    path_of,
    receive,
    run_command,
    run_python,
)
from tests.support.tcp_proxy import TcpProxy

JWT = {"mode": "jwt", "jwt": {"secret": SECRET}}
SHORT_RUN = ("--clients", "4", "--publishers", "2", "--duration", "0.3", "--warmup", "0.1")


async def run_with_stdin(content: bytes, *arguments: str) -> CommandResult:
    """Run a command in an interpreter whose standard input has this content."""
    async with running(*arguments) as command, asyncio.timeout(PATIENCE_S):
        stdout, stderr = await command.process.communicate(content)
        code = command.process.returncode
    assert code is not None
    return CommandResult(code, stdout.decode(), stderr.decode())


@asynccontextmanager
async def listening(url: str, *arguments: str, stdout: int = PIPE) -> AsyncIterator[RunningCommand]:
    """Run `listen` and wait until it is connected."""
    async with running("listen", *arguments, url, stdout=stdout) as command:
        await command.notice_with("connected to")
        yield command


async def wait_for_unread_bytes(pipe: int, count: int) -> None:
    """Wait until a pipe contains this number of unread bytes."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)
            if found == count:
                return
            await asyncio.sleep(POLL_S)


def url_of(relay: RelayProcess, channel: str) -> str:
    return relay.ws_url(f"/channels/{channel}")


async def send_all(client: ClientConnection, *messages: str | bytes) -> None:
    for message in messages:
        await client.send(message)


# listen


async def test_listen_prints_each_message_at_once_and_ends_after_count_messages(
    relay: RelayProcess, channel: str
) -> None:
    async with (
        listening(url_of(relay, channel), "--count", "3") as command,
        relay.client(channel) as publisher,
    ):
        for text in ("hello", "", "grüße"):
            await publisher.send(text)
            assert await command.next_line() == f"{text}\n"
        await publisher.send("one more")
        done = await command.finish()
    assert (done.exit_code, done.stdout) == (0, "")


async def test_listen_writes_payload_and_position_as_json(
    relay: RelayProcess, channel: str
) -> None:
    url = url_of(relay, channel)
    async with listening(url, "--json", "--count", "2") as command:
        async with relay.client(channel) as publisher:
            await send_all(publisher, "two\nlines", b"\x00\xff")
        done = await command.finish()
    text, binary = map(json.loads, done.stdout.splitlines())
    assert (text["text"], base64.b64decode(binary["base64"])) == ("two\nlines", b"\x00\xff")
    assert done.exit_code == 0
    resumed = await run_client("listen", "--since", text["position"], "--count", "1", "--json", url)
    assert json.loads(resumed.stdout) == binary


async def test_listen_writes_binary_messages_of_the_history_as_they_are(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.client(channel) as publisher:
        await send_all(publisher, "two\nlines", b"\x00\xff")
        await receive(publisher)
        await receive(publisher)
    async with running("listen", "--history", "2", "--count", "2", url_of(relay, channel)) as last:
        assert last.process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            assert await last.process.stdout.read() == b"two\nlines\n\x00\xff"
        assert await last.exit_code() == 0


async def test_listen_escapes_control_sequences_for_a_terminal(
    relay: RelayProcess, channel: str
) -> None:
    with pseudo_terminal() as (screen, program_side):
        url = url_of(relay, channel)
        async with listening(url, "--count", "2", stdout=program_side) as command:
            async with relay.client(channel) as publisher:
                await send_all(publisher, "\x1b]0;gotcha\x07 and more", b"12345")
            assert (await command.finish()).exit_code == 0
        shown = os.read(screen, 4096).decode()
    assert shown == "\\x1b]0;gotcha\\x07 and more\r\n[5 bytes]\r\n"


async def test_listen_reconnects_and_prints_the_messages_of_the_meantime(
    relay: RelayProcess, channel: str
) -> None:
    async with TcpProxy(relay.port) as proxy, relay.client(channel) as publisher:
        url = proxy.url(path_of(channel))
        async with listening(url) as command:
            await publisher.send("before")
            assert await command.next_line() == "before\n"
            proxy.cut()
            assert "connection lost; retrying in 0." in await command.next_notice()
            await publisher.send("meanwhile")
            assert await command.next_line() == "meanwhile\n"
            assert await command.next_notice() == f"websocket-relay: connected to {url}\n"


async def test_listen_prints_the_close_of_a_draining_relay_and_connects_to_the_next(
    relay_with: StartRelay, channel: str
) -> None:
    old = relay_with(shutdown={"spread_s": 0})
    async with TcpProxy(old.port) as proxy, listening(proxy.url(path_of(channel))) as command:
        new = relay_with()
        assert await old.stop() == 0
        assert "closed by the relay: draining; retry_ms=" in await command.next_notice()
        proxy.target = new.port
        await command.notice_with("connected to")
        async with new.client(channel) as publisher:
            await publisher.send("on the new one")
        # memory:// keeps no messages
        missing = f"websocket-relay: {channel}: messages are missing before the next one\n"
        assert await command.next_notice() == missing
        assert await command.next_line() == "on the new one\n"


async def test_listen_names_the_channel_of_each_line_if_there_are_several(
    relay: RelayProcess, channel: str
) -> None:
    names = (f"{channel}-a", f"{channel}-b")
    messages: list[tuple[str, str | bytes]] = [(names[0], "text"), (names[1], b"\x00")]
    for name, data in messages:
        async with relay.client(name) as publisher:
            await publisher.send(data)
            await receive(publisher)
    past = ("listen", "-q", "--history", "9", "--exit")
    done = await run_client(*past, relay.ws_url(), *names)
    assert sorted(done.stdout) == sorted(f"{names[0]}: text\n{names[1]}: \0")
    assert done.exit_code == 0
    done = await run_client(*past, "--json", relay.ws_url(), *names)
    lines = {fields.pop("channel"): fields for fields in map(json.loads, done.stdout.splitlines())}
    assert (lines[names[0]]["text"], lines[names[1]]["base64"]) == ("text", "AA==")


async def test_listen_exits_after_the_messages_of_the_past(
    relay: RelayProcess, channel: str
) -> None:
    url = url_of(relay, channel)
    assert await run_client("listen", "-q", "--history", "2", "--exit", url) == CommandResult(
        0, "", ""
    )
    async with relay.client(channel) as publisher:
        await send_all(publisher, "one", "two", "three")
        for _ in range(3):
            await receive(publisher)
    done = await run_client("listen", "-q", "--history", "2", "--exit", url)
    assert done == CommandResult(0, "two\nthree\n", "")


async def test_the_commands_take_the_url_from_the_environment(
    relay: RelayProcess, channel: str
) -> None:
    env = {"RELAY_URL": relay.ws_url()}
    sent = await run_client("send", "-q", "--channel", channel, "http://a message", env=env)
    assert sent == CommandResult(0, "", "")
    past = ("listen", "-q", "--history", "9", "--exit")
    assert (await run_client(*past, channel, env=env)).stdout == "http://a message\n"
    verified = await run_client("verify", *SHORT_VERIFY, "--channel", channel, env=env)
    assert verified.exit_code == 0, verified.stdout
    # An argument has precedence.
    env = {"RELAY_URL": UNAVAILABLE_URL}
    assert (await run_client(*past, relay.ws_url(), channel, env=env)).exit_code == 0
    done = await run_client("send", "-q", "one", "two", env=env)
    assert done.error_lines[-1] == "websocket-relay send: error: unrecognized arguments: one"


async def test_listen_names_the_channel_that_it_may_not_subscribe_to(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(auth=JWT)
    env = {"RELAY_TOKEN": sign_token(relay={"subscribe": [channel], "publish": []})}
    done = await run_client("listen", "-q", relay.ws_url(), channel, "secret", env=env)
    reason = "secret: not authorized for this channel"
    assert done == CommandResult(1, "", f"websocket-relay: {relay.ws_url()}: {reason}\n")


async def test_listen_ends_with_0_when_the_reader_of_its_output_exits_and_no_message_arrives(
    relay: RelayProcess, channel: str
) -> None:
    reading, writing = os.pipe()
    async with listening(url_of(relay, channel), stdout=writing) as command:
        os.close(writing)
        os.close(reading)
        assert await command.finish() == CommandResult(0, "", "")


async def test_listen_ends_with_0_when_the_reader_of_its_output_exits_while_it_writes(
    relay: RelayProcess, channel: str
) -> None:
    """200 KB are more than a pipe takes, so that `listen` writes when `head` has exited."""
    url = url_of(relay, channel)
    lines = [f"{number:0999}\n" for number in range(200)]
    async with relay.client(channel) as publisher:
        for line in lines:
            await publisher.send(line.rstrip())
            await receive(publisher)
    command = f"{sys.executable} -m websocket_relay listen --history 200 {url} | head -n 2"
    done = await asyncio.to_thread(
        subprocess.run,
        ["bash", "-o", "pipefail", "-c", command],
        env=environment(NO_PROXY),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "".join(lines[:2]))
    assert done.stderr == f"websocket-relay: connected to {url}\n"


async def test_listen_reports_that_its_output_cannot_be_written(
    relay: RelayProcess, channel: str
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    async with listening(url_of(relay, channel), stdout=full) as command:
        os.close(full)
        async with relay.client(channel) as publisher:
            await publisher.send("not written")
        done = await command.finish()
    line = "websocket-relay: standard output: No space left on device\n"
    assert (done.exit_code, done.stderr) == (1, line)


async def test_ctrl_c_ends_listen_with_130_and_a_closing_handshake(
    relay: RelayProcess, channel: str
) -> None:
    before = await relay.metric("websocket_closes_total", code="1000")
    async with listening(url_of(relay, channel)) as command:
        command.process.send_signal(signal.SIGINT)
        assert await command.finish() == CommandResult(130, "", "")
    await relay.await_metric("websocket_closes_total", before + 1, code="1000")


async def test_ctrl_c_ends_a_command_that_waits_for_a_relay() -> None:
    async with running("listen", "--patience", "60", "ws://127.0.0.1:1/") as command:
        await command.notice_with("connection refused; retrying in")
        command.process.send_signal(signal.SIGINT)
        assert (await command.finish()).exit_code == 130


# send


async def test_send_publishes_a_message_and_prints_no_notices_when_quiet(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.client(channel) as subscriber:
        done = await run_client("send", "--quiet", url_of(relay, channel), "hello, world")
        assert done == CommandResult(0, "", "")
        assert await receive(subscriber) == "hello, world"


@pytest.mark.parametrize(
    ("content", "messages"),
    [("one\r\n\r\ngrüße\nlast", ["one", "", "grüße", "last"]), ("", [])],
    ids=["lines", "nothing"],
)
async def test_send_publishes_each_line_of_its_input(
    relay: RelayProcess, channel: str, content: str, messages: list[str]
) -> None:
    async with relay.client(channel) as subscriber:
        done = await run_with_stdin(content.encode(), "send", url_of(relay, channel))
        assert (done.exit_code, done.stdout) == (0, "")
        await subscriber.send("the end")
        received = [await receive(subscriber) for _ in range(len(messages) + 1)]
        assert received == [*messages, "the end"]


async def test_send_publishes_a_line_as_soon_as_it_is_complete(
    relay: RelayProcess, channel: str
) -> None:
    async with (
        relay.client(channel) as subscriber,
        running("send", url_of(relay, channel)) as command,
    ):
        for text in ("one", "two"):
            await command.write_stdin(f"{text}\n")
            assert await receive(subscriber) == text


async def test_send_publishes_a_file_or_its_input_as_one_binary_message(
    relay: RelayProcess, channel: str, tmp_path: Path
) -> None:
    content = bytes(range(256)) * 1_000
    file = tmp_path / "picture"
    file.write_bytes(content)
    url = url_of(relay, channel)
    async with relay.client(channel) as subscriber:
        assert (await run_client("send", "--binary", str(file), url)).exit_code == 0
        assert (await run_with_stdin(content, "send", "--binary", "-", url)).exit_code == 0
        assert [await receive(subscriber), await receive(subscriber)] == [content, content]


async def test_send_publishes_a_long_input_exactly_once_across_a_restart_of_a_replica(
    redis_replicas: tuple[RelayProcess, RelayProcess], channel: str
) -> None:
    old, new = redis_replicas
    numbers = [str(number) for number in range(2_000)]
    async with (
        TcpProxy(old.port) as proxy,
        running("send", proxy.url(path_of(channel))) as command,
        new.client(channel) as subscriber,
    ):
        await command.write_stdin("\n".join(numbers[:1_000]) + "\n")
        await old.await_metric_at_least("websocket_messages_total", 100)
        proxy.target = new.port
        assert await old.stop(signal.SIGKILL) != 0
        await command.write_stdin("\n".join(numbers[1_000:]))
        done = await command.finish()
        assert done.exit_code == 0, done.stderr
        assert [await receive(subscriber) for _ in numbers] == numbers


async def test_send_reports_the_number_of_unconfirmed_messages(
    relay_with: StartRelay, channel: str
) -> None:
    """Without a broker, the log of a relay ends with it."""
    old, new = relay_with(), relay_with()
    async with (
        TcpProxy(old.port) as proxy,
        running("send", proxy.url(path_of(channel))) as command,
    ):
        await command.notice_with("connected to")
        proxy.lose_client_bytes()
        await command.write_stdin("one\ntwo\n")
        await proxy.await_lost_bytes()
        proxy.target = new.port
        proxy.cut()
        await command.notice_with("connection lost; retrying in")
        done = await command.finish()
    assert done.exit_code == 1
    shown = proxy.url(path_of(channel))
    why = "2 messages unconfirmed: the relay no longer knows the session"
    assert done.error_lines[-1] == f"websocket-relay: {shown}: {why}"


@pytest.mark.parametrize("size", [1_001, 100_000], ids=["by an answer", "by a close"])
@pytest.mark.parametrize("is_line", [False, True], ids=["argument", "line"])
async def test_send_reports_a_message_that_the_relay_refuses_as_not_published(
    relay_with: StartRelay, channel: str, size: int, is_line: bool
) -> None:
    relay = relay_with(limits={"max_message_bytes": 1_000})
    url, message = url_of(relay, channel), "x" * size
    async with relay.client(channel) as subscriber:
        if is_line:
            done = await run_with_stdin(f"before\n{message}\n".encode(), "send", "-q", url)
            assert await receive(subscriber) == "before"
        else:
            done = await run_client("send", "-q", url, message)
    close = "" if size == 1_001 else "closed by the relay: "
    assert done.exit_code == 1
    (line,) = done.error_lines
    assert line.startswith(f"websocket-relay: {url}: {close}message too big")
    assert line.endswith("; 1 message not published")


async def test_send_ends_when_the_relay_is_unavailable_though_its_input_is_open(
    relay: RelayProcess, channel: str
) -> None:
    async with TcpProxy(relay.port) as proxy:
        url = proxy.url(path_of(channel))
        async with running("send", "--patience", "0", url) as command:
            await command.notice_with("connected to")
            proxy.target = None
            proxy.cut()
            assert await command.exit_code() == 1


async def test_ctrl_c_ends_send_while_its_input_is_open(relay: RelayProcess, channel: str) -> None:
    async with running("send", url_of(relay, channel)) as command:
        await command.notice_with("connected to")
        command.process.send_signal(signal.SIGINT)
        assert await command.exit_code() == 130


async def test_ctrl_c_ends_send_while_it_reads_a_binary_message(
    relay: RelayProcess, channel: str
) -> None:
    async with running("send", "--binary", "-", url_of(relay, channel)) as command:
        await command.write_stdin("the first part")
        assert command.process.stdin is not None
        await wait_for_unread_bytes(command.process.stdin.get_extra_info("pipe").fileno(), 0)
        command.process.send_signal(signal.SIGINT)
        assert await command.exit_code() == 130


async def test_send_rejects_input_that_is_not_utf_8_and_a_missing_file(
    relay: RelayProcess, channel: str, tmp_path: Path
) -> None:
    done = await run_with_stdin(b"one\n\xff\n", "send", "-q", url_of(relay, channel))
    assert done.exit_code == 2
    assert done.stderr == "websocket-relay: line 2 is not UTF-8; --binary sends any bytes\n"
    missing = tmp_path / "picture"
    done = await run_client("send", "-q", "--binary", str(missing), url_of(relay, channel))
    assert done.exit_code == 1
    assert done.stderr == f"websocket-relay: {missing}: No such file or directory\n"


async def test_send_rejects_an_input_that_is_too_large_without_reading_all_of_it(
    relay: RelayProcess, channel: str, tmp_path: Path
) -> None:
    file, url = tmp_path / "film", url_of(relay, channel)
    with file.open("wb") as opened:
        opened.truncate(MAX_MESSAGE_BYTES * 1_000)  # a sparse file
    done = await run_client("send", "-q", "--binary", str(file), url)
    words = f"{file}: a message has at most 67,108,864 bytes"
    assert done == CommandResult(2, "", f"websocket-relay: {words}\n")
    with file.open("rb") as opened:
        async with running("send", "-q", url, stdin=opened.fileno()) as command:
            done = await command.finish()
    assert done == CommandResult(2, "", "websocket-relay: line 1 has more than 67,108,864 bytes\n")


# bench


async def test_the_stats_of_bench_agree_with_the_metrics_of_the_relay(
    relay_with: StartRelay, channel: str, tmp_path: Path
) -> None:
    relay = relay_with()
    json_file = tmp_path / "bench.json"
    load = (*SHORT_RUN, "--warmup", "0", "--rate", "200", "--json", str(json_file))
    done = await run_client("bench", *load, url_of(relay, channel))
    assert (done.exit_code, done.stderr) == (0, "")
    stats = json.loads(json_file.read_text())
    assert stats["sent"] >= 40
    assert stats["deliveries"] == 4 * stats["sent"]
    assert (stats["missing"], stats["closed"]) == (0, {})
    assert await relay.metric("websocket_messages_total") == stats["sent"]
    latency = stats["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"] < 10_000
    rows = {line.rpartition("  ")[0].split("  ")[0]: line for line in done.stdout.splitlines()}
    assert f"{stats['sent']:,}" in done.stdout
    assert {"messages", "deliveries", "missing", "latency p50", "latency p99"} <= rows.keys()


async def test_bench_with_a_window_has_no_rate(relay: RelayProcess, channel: str) -> None:
    done = await run_client(
        "bench", *SHORT_RUN, "--window", "2", "--bytes", "70000", url_of(relay, channel)
    )
    assert (done.exit_code, done.stderr) == (0, "")
    assert "2 in flight each, 70,000 bytes each" in done.stdout


async def test_bench_connects_over_tls_with_a_token(
    tls_relay_with: StartRelay, channel: str, certificate_directory: Path
) -> None:
    relay = tls_relay_with(auth=JWT)
    trust = ("--ca", str(certificate_directory / "cert.pem"))
    url, env = url_of(relay, channel), {"RELAY_TOKEN": sign_token()}
    done = await run_client("bench", *SHORT_RUN, *trust, url, env=env)
    assert (done.exit_code, done.stderr) == (0, "")


async def test_bench_reports_closed_clients_and_missing_deliveries(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_messages_per_s": 5})
    url = url_of(relay, channel)
    done = await run_client("bench", *SHORT_RUN, "--warmup", "0", "--rate", "400", url)
    assert done.exit_code == 1
    closed, missing = done.error_lines
    assert closed == "websocket-relay: 2 clients were closed: rate limit (1008)"
    assert missing.endswith("deliveries are missing")


async def test_bench_prints_its_progress_to_a_terminal(relay: RelayProcess, channel: str) -> None:
    with pseudo_terminal() as (screen, program_side):
        url = url_of(relay, channel)
        async with running("bench", *SHORT_RUN, url, stderr=program_side) as command:
            done = await command.finish()
        shown = os.read(screen, 65_536).decode()
    assert done.exit_code == 0
    assert "deliveries/s  p50 " in shown
    assert "warming up" in shown
    assert max(map(len, shown.split("\r\x1b[K"))) < 80
    assert shown.endswith("\r\x1b[K")
    assert "latency p50" in done.stdout


async def test_ctrl_c_ends_bench_with_130_and_the_stats_so_far(
    relay: RelayProcess, channel: str
) -> None:
    url = url_of(relay, channel)
    options = (*SHORT_RUN, "--duration", "60", "--warmup", "0", "--rate", "100")
    before = await relay.metric("websocket_messages_total")
    async with running("bench", *options, url) as command:
        await relay.await_metric_at_least("websocket_messages_total", before + 20)
        command.process.send_signal(signal.SIGINT)
        done = await command.finish()
    assert (done.exit_code, done.stderr) == (130, "")
    assert "latency p50" in done.stdout


async def test_bench_reports_an_unwritable_file_before_it_measures(tmp_path: Path) -> None:
    """Nothing listens on the port: an attempt to connect would be the error."""
    file = str(tmp_path / "not there" / "bench.json")
    done = await run_client("bench", *SHORT_RUN, "--json", file, UNAVAILABLE_URL)
    assert done == CommandResult(1, "", f"websocket-relay: {file}: No such file or directory\n")


async def test_bench_reports_why_its_clients_were_refused(
    relay_with: StartRelay, channel: str
) -> None:
    url = url_of(relay_with(limits={"max_connections": 3}), channel)
    done = await run_client("bench", *SHORT_RUN, url)
    assert done.exit_code == 1
    assert done.stderr == f"websocket-relay: {url}: HTTP 503, too many connections\n"


class RecordingTransport(asyncio.Transport):
    """A transport that records the bytes written to it, without a socket."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_reading_paused = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.is_reading_paused = True

    def resume_reading(self) -> None:
        self.is_reading_paused = False


@pytest.mark.parametrize(
    ("message_bytes", "read_bytes"),
    [(20, 1), (125, 7), (126, 1), (126, 100_000), (65_535, 5_000), (65_536, 100_000)],
)
async def test_a_bench_client_counts_its_messages_only_and_at_any_size_of_a_read(
    message_bytes: int, read_bytes: int
) -> None:
    tally, layout = Tally(start_ns=1), BenchMessage.of(message_bytes)
    echoes: list[int] = []
    uri = parse_uri("ws://relay.example/channels/bench")
    client = BenchClient(7, uri, {}, layout, tally, lambda _, count: echoes.append(count))
    transport = RecordingTransport()
    client.connection_made(transport)
    server = ServerProtocol()
    server.receive_data(transport.written)
    (request,) = server.events_received()
    assert isinstance(request, Request)
    server.send_response(server.accept(request))
    client.data_received(b"".join(server.data_to_send()))
    await client.opened
    transport.written = b""

    def message(sender: int, due_ns: int, mark: bytes = layout.mark) -> bytes:
        stamp = due_ns.to_bytes(8) + sender.to_bytes(4)
        return layout.head + (mark + stamp).ljust(message_bytes, b"x")

    now_ns = time.perf_counter_ns()
    stream = b"".join(
        (
            message(7, now_ns),
            Frame(Opcode.BINARY, b"foo").serialize(mask=False),
            message(8, now_ns) + message(7, now_ns),
            message(7, now_ns, b"another!"),
            Frame(Opcode.TEXT, b"t" * 200).serialize(mask=False),
            b"\x89\x02hi",
            message(7, 0),  # before the start
            message(9, now_ns),
        )
    )
    for start in range(0, len(stream), read_bytes):
        client.data_received(stream[start : start + read_bytes])
    assert tally.deliveries == 4
    assert sum(echoes) == 3
    assert sum(tally.latencies.counts) == 4
    server.receive_data(transport.written)
    assert server.events_received() == [Frame(Opcode.PONG, b"hi")]
    await asyncio.sleep(0)
    assert not transport.is_reading_paused  # a large read pauses it for one turn of the loop


@pytest.mark.parametrize(
    ("cpu_share", "late_ms", "sent", "words"),
    [
        (0.95, 1.0, 1_000, "This client was the bottleneck"),
        (0.5, 20.0, 1_000, "This client was late itself"),
        (0.5, 1.0, 900, "The relay did not accept 100 messages a second."),
        (0.5, 1.0, 1_000, "own delay p99"),
    ],
)
def test_the_last_line_of_the_table_names_the_component_that_limits_the_result(
    cpu_share: float, late_ms: float, sent: int, words: str
) -> None:
    load = BenchLoad(10, 1, 100, 0, 128, 10.0, 0.0)
    tally = Tally(start_ns=1, sent=sent, deliveries=sent * 10)
    tally.latencies.note(10_000_000)
    tally.close(0.0)
    last = table("ws://relay/", BenchResult(load, tally, 10.0, cpu_share, late_ms)).splitlines()[-1]
    assert last.startswith(words)


def test_quantiles_have_an_error_of_at_most_one_percent() -> None:
    latencies = Latencies()
    for micros in range(1, 10_001):
        latencies.note(micros * 1_000)
    for share, exact in ((0.5, 5.0), (0.9, 9.0), (0.99, 9.9)):
        assert latencies.quantile_ms(share) == pytest.approx(exact, rel=0.011)
    assert latencies.summary_ms()["max"] == 10.0
    assert Latencies().quantile_ms(0.5) is None


# Errors: one line, and the documented exit status

UNAVAILABLE_URL = "ws://127.0.0.1:1/channels/news"
SHORT_VERIFY = ("--clients", "2", "--publishers", "1", "--rate", "50", "--seconds", "0.3")
CLIENT_COMMANDS: Sequence[tuple[str, ...]] = (
    ("listen",),
    ("send", "-q"),
    ("bench", *SHORT_RUN),
    ("verify", *SHORT_VERIFY),
)

each_client_command = pytest.mark.parametrize(
    "command", CLIENT_COMMANDS, ids=lambda command: command[0]
)


def with_url(command: Sequence[str], url: str, *further: str) -> list[str]:
    return [*command, *further, url, *(["hello"] if command[0] == "send" else [])]


@each_client_command
async def test_an_unavailable_relay_is_one_line_and_1(command: Sequence[str]) -> None:
    done = await run_client(*with_url(command, UNAVAILABLE_URL))
    assert done == CommandResult(1, "", f"websocket-relay: {UNAVAILABLE_URL}: connection refused\n")


@each_client_command
async def test_a_command_names_the_proxy_that_fails_and_no_proxy_connects_directly(
    relay: RelayProcess, channel: str, command: Sequence[str]
) -> None:
    url, proxy = url_of(relay, channel), {"no_proxy": "", "https_proxy": "http://127.0.0.1:1"}
    if command[0] != "bench":  # it always connects directly
        done = await run_client(*with_url(command, url), env=proxy)
        line = "connection refused (via proxy http://127.0.0.1:1); --no-proxy connects directly"
        assert done == CommandResult(1, "", f"websocket-relay: {url}: {line}\n")
    count = ("--history", "1", "--count", "1") if command[0] == "listen" else ()
    if count:
        assert (await run_client("send", url, "hello")).exit_code == 0
    done = await run_client(*with_url(command, url, "--no-proxy", *count), env=proxy)
    assert done.exit_code == 0, done.stderr


@each_client_command
async def test_ctrl_c_during_the_imports_of_a_command_ends_it_with_130(
    command: Sequence[str], tmp_path: Path
) -> None:
    (tmp_path / "websockets.py").write_text("import signal; signal.raise_signal(signal.SIGINT)\n")
    path = f"{tmp_path}{os.pathsep}{environment()['PYTHONPATH']}"
    done = await run_client(*with_url(command, UNAVAILABLE_URL), env={"PYTHONPATH": path})
    assert done == CommandResult(130, "", "")


async def test_another_ctrl_c_ends_a_command_that_hangs(relay: RelayProcess, channel: str) -> None:
    reading, writing = os.pipe()
    async with listening(url_of(relay, channel), stdout=writing) as command:
        os.close(writing)
        async with relay.client(channel) as publisher:
            await publisher.send("x" * 200_000)
            # The pipe is full: the command blocks in a write.
            await wait_for_unread_bytes(reading, 65_536)
        # Not by send_signal: that polls the process, and asyncio may miss its end then (255).
        with suppress(ProcessLookupError):
            while command.process.returncode is None:
                os.kill(command.process.pid, signal.SIGINT)
                await asyncio.sleep(POLL_S)
        done = await command.finish()
        os.close(reading)
    assert done.exit_code in {130, -signal.SIGINT}  # a shell makes 130 of both
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(
    ("command", "url", "why"),
    [
        (CLIENT_COMMANDS[0], "localhost:8443/secret", "scheme isn't ws or wss"),
        (CLIENT_COMMANDS[1], "http://localhost/secret", "scheme isn't ws or wss"),
        (CLIENT_COMMANDS[2], "ws://:1/", "hostname isn't provided"),
        (CLIENT_COMMANDS[3], "ws://relay/?since=1-0-0", "since is an option of `subscribe`"),
    ],
    ids=["listen", "send", "bench", "verify"],
)
async def test_an_invalid_url_is_one_line_and_2(command: Sequence[str], url: str, why: str) -> None:
    done = await run_client(*with_url(command, url))
    line = "not a relay URL such as ws://localhost:8443: "
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"websocket-relay: {line}")
    assert done.stderr.endswith(f"{why}\n")


@each_client_command
async def test_a_rejected_token_is_one_line_and_1_and_never_shown(
    relay_with: StartRelay, channel: str, command: Sequence[str], tmp_path: Path
) -> None:
    relay = relay_with(auth=JWT)
    url = url_of(relay, channel)
    without = await run_client(*with_url(command, url))
    assert without == CommandResult(1, "", f"websocket-relay: {url}: HTTP 401, token required\n")
    bad = sign_token(exp=1)
    file = tmp_path / "token.txt"
    file.write_text(f"{bad}\n")
    for done in (
        await run_client(*with_url(command, f"{url}?access_token={bad}")),
        await run_client(*with_url(command, url), env={"RELAY_TOKEN": bad}),
        await run_client(*with_url(command, url, "--token-file", str(file))),
    ):
        why = "HTTP 401, invalid token: expired"
        assert done == CommandResult(1, "", f"websocket-relay: {url}: {why}\n")
    if command[0] == "send":
        file.write_text(sign_token())
        sent = await run_client(*with_url(command, url, "--token-file", str(file)))
        assert sent.exit_code == 0


@each_client_command
async def test_a_token_file_without_a_token_is_one_line_and_2(
    command: Sequence[str], tmp_path: Path
) -> None:
    file = tmp_path / "token.txt"
    arguments = with_url(command, UNAVAILABLE_URL, "--token-file", str(file))
    missing = await run_client(*arguments)
    assert missing == CommandResult(2, "", f"websocket-relay: {file}: No such file or directory\n")
    file.write_text("\n")
    empty = await run_client(*arguments)
    assert empty == CommandResult(2, "", f"websocket-relay: {file}: contains no token\n")


@each_client_command
async def test_a_certificate_is_trusted_if_ca_names_it(
    tls_relay_with: StartRelay,
    channel: str,
    command: Sequence[str],
    certificate_directory: Path,
) -> None:
    relay = tls_relay_with()
    url, ca = url_of(relay, channel), str(certificate_directory / "cert.pem")
    done = await run_client(*with_url(command, url))
    assert done.exit_code == 1
    (line,) = done.error_lines
    assert line.startswith(f"websocket-relay: {url}: certificate not trusted: self")
    assert line.endswith("; trust its authority with --ca FILE")
    if command[0] == "send":
        assert (await run_client(*with_url(command, url, "--ca", ca))).exit_code == 0
    key = str(certificate_directory / "key.pem")
    done = await run_client(*with_url(command, url, "--ca", key))
    assert done == CommandResult(2, "", f"websocket-relay: {key}: contains no certificate\n")
    done = await run_client(*with_url(command, UNAVAILABLE_URL, "--ca", ca))
    assert done == CommandResult(2, "", "websocket-relay: --ca requires a wss:// URL\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["listen"],
        ["listen", "--count", "0", UNAVAILABLE_URL],
        ["listen", "--since", "1-0-0", "--history", "3", UNAVAILABLE_URL],
        ["listen", "--patience", "-1", UNAVAILABLE_URL],
        ["send", "--binary", "f", UNAVAILABLE_URL, "message"],
        ["bench", "--bytes", "19", UNAVAILABLE_URL],
        ["bench", "--duration", "0", UNAVAILABLE_URL],
        ["bench", "--rate", "1", "--window", "1", UNAVAILABLE_URL],
        ["verify"],
        ["verify", "--clients", "0", UNAVAILABLE_URL],
    ],
    ids=lambda arguments: " ".join(arguments[:3]),
)
def test_wrong_usage_ends_with_2_and_one_error_line(tmp_path: Path, arguments: list[str]) -> None:
    done = run_command(*arguments, directory=tmp_path)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.error_lines[-1].startswith(f"websocket-relay {arguments[0]}: error: ")


@pytest.mark.parametrize("command", ["listen", "send", "bench", "verify"])
def test_the_help_has_examples_and_exit_statuses(tmp_path: Path, command: str) -> None:
    done = run_command(command, "--help", directory=tmp_path)
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"  websocket-relay {command} " in done.stdout.partition("examples:")[2]
    assert "Exit status: 0 done" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


# Installations without the relay's dependencies

AS_ON_WINDOWS = """
import asyncio, signal, sys

def fails(*arguments):
    raise NotImplementedError

asyncio.SelectorEventLoop.add_reader = asyncio.SelectorEventLoop.add_signal_handler = fails
sys.modules |= dict.fromkeys(["fcntl", "grp", "pwd", "resource", "termios", "tty", "uvloop"])
for name in ("pthread_sigmask", "sigwait", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
from websocket_relay import Relay
from websocket_relay.__main__ import main
url = sys.argv[1]
for arguments in (
    ["send", "-q", url, "hello"],
    ["listen", "-q", "--history", "1", "--count", "1", url],
    ["bench", "--duration", "0.1", "--warmup", "0", "--clients", "1", url],
    ["verify", "--seconds", "0.1", "--clients", "1", url],
    ["serve"],
    [],
    ["check"],
):
    sys.argv[1:] = arguments
    print(arguments, main(), file=sys.stderr)
"""


def test_client_commands_run_without_the_modules_that_windows_lacks(
    relay: RelayProcess, channel: str, tmp_path: Path
) -> None:
    url = relay.ws_url(f"/channels/{channel}")
    done = run_python("-c", AS_ON_WINDOWS, url, directory=tmp_path, env=NO_PROXY)
    assert done.stdout.startswith("hello\n"), done.stderr
    statuses = [line.rpartition(" ")[2] for line in done.error_lines if line.startswith("[")]
    assert statuses == ["0", "0", "0", "0", "1", "1", "1"], done.stderr
    line = "websocket-relay: the relay runs on Linux and macOS, its client also on Windows"
    assert done.error_lines.count(line) == 3


def test_a_client_command_imports_no_server(tmp_path: Path) -> None:
    code = (
        "import sys, websocket_relay.cli.main as cli;"
        "print({'asyncio', 'websockets'} & {*sys.modules});"
        "cli._parser(); print({'fastapi', 'uvicorn', 'pydantic'} & {*sys.modules})"
    )
    done = run_python("-c", code, directory=tmp_path)
    assert (done.exit_code, done.stdout) == (0, "set()\nset()\n"), done.stderr


@pytest.fixture
def client_only(tmp_path: Path) -> Callable[..., CommandResult]:
    """Run the command line where only the client's dependencies are installed."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for package in (PACKAGE, Path(websockets.__path__[0])):
        (packages / package.name).symlink_to(package)

    def run(*arguments: str) -> CommandResult:
        env = NO_PROXY | {"PYTHONPATH": str(packages)}
        return run_python("-S", "-m", "websocket_relay", *arguments, directory=tmp_path, env=env)

    return run


@pytest.mark.parametrize("command", [*CLIENT_COMMANDS[:1], *CLIENT_COMMANDS[2:]], ids=str)
def test_a_client_command_needs_no_dependency_of_the_relay(
    client_only: Callable[..., CommandResult], command: Sequence[str]
) -> None:
    done = client_only(*with_url(command, UNAVAILABLE_URL))
    assert done == CommandResult(1, "", f"websocket-relay: {UNAVAILABLE_URL}: connection refused\n")


async def test_send_publishes_without_the_dependencies_of_the_relay(
    relay: RelayProcess, channel: str, client_only: Callable[..., CommandResult]
) -> None:
    sent = await asyncio.to_thread(client_only, "send", "-q", url_of(relay, channel), "hello")
    assert sent == CommandResult(0, "", "")


@pytest.mark.parametrize("command", [[], ["check"]], ids=["serve", "check"])
def test_a_command_of_the_relay_names_the_extra_that_is_not_installed(
    client_only: Callable[..., CommandResult], command: list[str]
) -> None:
    done = client_only(*command)
    assert done.exit_code == 1
    assert "pip install 'websocket-relay[server]'" in done.stderr
    assert len(done.error_lines) == 1
