"""`SyncRelay`: the client for programs without asyncio."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from websocket_relay import Message, RejectedError, SyncRelay, UnavailableError

from tests.support.issuer import SECRET, sign_token
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import RelayProcess, StartRelay, environment


def client_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "websocket-relay-client"]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def test_a_script_publishes_and_receives(relay: RelayProcess, channel: str) -> None:
    with SyncRelay(relay.ws_url(f"/channels/{channel}")) as client:
        assert client.channel == channel
        positions = [client.publish(channel, data) for data in ("text", b"\x00\xff", "last")]
        received = []
        for message in client.subscribe(channel, history=3):
            received.append(message)
            if message.data == "last":
                break
        assert [message.position for message in received] == positions
        with client.subscribe(channel, since=positions[1]) as subscription:
            assert next(subscription).data == "last"
            client.publish(channel, "new")
            assert next(subscription).data == "new"
            with pytest.raises(RuntimeError, match="already subscribed"):
                client.subscribe(channel)
        assert [each.data for each in client.subscribe(channel, history=2, follow=False)] == [
            "last",
            "new",
        ]
        client.renew_token()
    assert not client_threads()


def test_a_subscription_has_the_members_of_its_channel(relay_with: StartRelay) -> None:
    relay = relay_with(presence={"channels": ["*"]})
    counted = threading.Event()
    with (
        SyncRelay(relay.ws_url()) as client,
        client.subscribe("team", presence=True, on_presence=lambda _: counted.set()) as team,
    ):
        assert counted.wait(PATIENCE_S)
        assert team.members is not None
        assert len(team.members) == team.count == 1


def test_several_threads_use_one_client(relay: RelayProcess, channel: str) -> None:
    with (
        SyncRelay(relay.ws_url()) as client,
        client.subscribe(channel) as subscription,
        ThreadPoolExecutor(8) as pool,
    ):
        list(pool.map(lambda number: client.publish(channel, str(number)), range(100)))
        received = {next(subscription).data for _ in range(100)}
    assert received == {str(number) for number in range(100)}


def test_close_ends_the_loops_of_other_threads(relay: RelayProcess, channel: str) -> None:
    received: list[Message] = []
    with SyncRelay(relay.ws_url()) as client:
        subscription = client.subscribe(channel)
        loop = threading.Thread(target=lambda: received.extend(subscription))
        loop.start()
        client.publish(channel, "hello")
    loop.join(PATIENCE_S)
    assert not loop.is_alive()
    assert [message.data for message in received] in ([], ["hello"])
    subscription.unsubscribe()
    client.close()
    with pytest.raises(RuntimeError, match="the client was closed"):
        client.publish(channel, "lost")
    with pytest.raises(RuntimeError, match="make a new one"):
        client.connect()


def test_errors_are_raised_in_the_thread_of_the_call(relay_with: StartRelay, channel: str) -> None:
    with pytest.raises(RuntimeError, match="use it in `with`"):
        SyncRelay("ws://127.0.0.1:1/").publish(channel, "lost")
    with pytest.raises(UnavailableError, match="connection refused"):
        SyncRelay("ws://127.0.0.1:1/", start_patience_s=0).connect()
    assert not client_threads()
    relay = relay_with(auth={"mode": "jwt", "jwt": {"secret": SECRET}})
    token = sign_token(relay={"subscribe": [], "publish": []})
    with SyncRelay(relay.ws_url(), token=token) as client:
        with pytest.raises(RejectedError, match="not authorized"):
            client.publish(channel, "lost")
        with pytest.raises(RejectedError, match="not authorized"):
            list(client.subscribe(channel))


def test_a_client_is_not_used_after_a_fork(relay: RelayProcess, channel: str) -> None:
    with SyncRelay(relay.ws_url()) as client:
        pid = os.fork()
        if not pid:  # the child
            try:
                client.publish(channel, "from the child")
            except RuntimeError as error:
                os._exit(0 if "before a fork" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert client.publish(channel, "from the parent")


SCRIPT = """
import sys
from websocket_relay import SyncRelay

with SyncRelay(sys.argv[1]) as relay, relay.subscribe(sys.argv[2]) as subscription:
    print("subscribed", flush=True)
    for message in subscription:
        print(message.data, flush=True)
"""


def test_ctrl_c_ends_a_script_that_waits_for_messages(relay: RelayProcess, channel: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, relay.ws_url(), channel],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment({"no_proxy": "*"}),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "subscribed\n"
        started_at = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == -signal.SIGINT
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    assert time.monotonic() - started_at < PATIENCE_S / 2
