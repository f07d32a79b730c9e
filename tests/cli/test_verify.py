"""`verify`: it finds each kind of fault, and none where replicas are killed and restarted."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from websocket_relay.cli.verify.judge import DeliveryJudge, MessageId, Outcome, Verdict

from tests.support.brokers import RedisBroker, free_port
from tests.support.client_commands import pseudo_terminal, run_client, running
from tests.support.programs import ANY_REDIS, needed
from tests.support.relay_process import RelayProcess, StartRelay
from tests.support.tcp_proxy import ProxiedConnection, TcpProxy

SMALL = ("--clients", "3", "--publishers", "2", "--rate", "100")

# The judgement

Plant = Callable[[DeliveryJudge], None]


def message(number: int, publisher: int = 0) -> MessageId:
    return MessageId("a", publisher, number)


def position(number: int) -> str:
    return f"1-{number}-0"


def publish(judge: DeliveryJudge, number: int, outcome: Outcome = Outcome.ACKNOWLEDGED) -> None:
    is_acknowledged = outcome is Outcome.ACKNOWLEDGED
    judge.on_settled(message(number), outcome, position(number) if is_acknowledged else "")


def deliver(judge: DeliveryJudge, subscriber: int, *numbers: int) -> None:
    for number in numbers:
        judge.on_delivered(subscriber, message(number), position(number))


def verdict_of(plant: Plant) -> Verdict:
    """Judge a run with two subscribers: three messages without a fault, then a plant."""
    judge = DeliveryJudge(2)
    for number in (1, 2, 3):
        deliver(judge, 0, number)
        publish(judge, number)
        deliver(judge, 1, number)
    plant(judge)
    return judge.verdict()


def nothing(judge: DeliveryJudge) -> None:
    pass


def unconfirmed_and_not_delivered(judge: DeliveryJudge) -> None:
    publish(judge, 4, Outcome.UNCONFIRMED)
    publish(judge, 5)
    for subscriber in (0, 1):
        deliver(judge, subscriber, 5)


def unconfirmed_and_delivered_late(judge: DeliveryJudge) -> None:
    publish(judge, 4, Outcome.UNCONFIRMED)
    publish(judge, 5)
    for subscriber in (0, 1):
        judge.on_delivered(subscriber, message(5), position(5))
        judge.on_delivered(subscriber, message(4), position(6))


def refused_and_not_delivered(judge: DeliveryJudge) -> None:
    publish(judge, 4, Outcome.REFUSED)


@pytest.mark.fast
@pytest.mark.parametrize(
    "plant",
    [
        nothing,
        unconfirmed_and_not_delivered,
        unconfirmed_and_delivered_late,
        refused_and_not_delivered,
    ],
)
def test_a_run_without_a_fault_is_clean(plant: Plant) -> None:
    verdict = verdict_of(plant)
    assert verdict.is_clean, verdict
    assert verdict.examples == ()


def lost_at_one_subscriber(judge: DeliveryJudge) -> None:
    publish(judge, 4)
    deliver(judge, 0, 4)


def lost_at_all_subscribers(judge: DeliveryJudge) -> None:
    publish(judge, 4)
    publish(judge, 5)
    for subscriber in (0, 1):
        deliver(judge, subscriber, 5)


def unconfirmed_and_delivered_to_one(judge: DeliveryJudge) -> None:
    publish(judge, 4, Outcome.UNCONFIRMED)
    deliver(judge, 0, 4)


def delivered_twice(judge: DeliveryJudge) -> None:
    deliver(judge, 0, 3)


def delivered_twice_at_two_positions(judge: DeliveryJudge) -> None:
    judge.on_delivered(0, message(3), position(9))


def unconfirmed_and_delivered_twice(judge: DeliveryJudge) -> None:
    publish(judge, 4, Outcome.UNCONFIRMED)
    for subscriber in (0, 1):
        deliver(judge, subscriber, 4)
    deliver(judge, 0, 4)


def refused_and_delivered(judge: DeliveryJudge) -> None:
    publish(judge, 4, Outcome.REFUSED)
    deliver(judge, 0, 4)


def delivered_and_refused(judge: DeliveryJudge) -> None:
    deliver(judge, 0, 4)
    publish(judge, 4, Outcome.REFUSED)


def out_of_the_order_of_the_publisher(judge: DeliveryJudge) -> None:
    for number, place in ((4, 5), (5, 4)):
        judge.on_settled(message(number), Outcome.ACKNOWLEDGED, position(place))
    for subscriber in (0, 1):
        judge.on_delivered(subscriber, message(5), position(4))
        judge.on_delivered(subscriber, message(4), position(5))


def out_of_the_order_of_positions(judge: DeliveryJudge) -> None:
    for publisher, place in ((1, 4), (2, 5)):
        judge.on_settled(message(1, publisher), Outcome.ACKNOWLEDGED, position(place))
    for subscriber, order in ((0, (1, 2)), (1, (2, 1))):
        for publisher in order:
            judge.on_delivered(subscriber, message(1, publisher), position(publisher + 3))


def at_two_positions(judge: DeliveryJudge) -> None:
    publish(judge, 4)
    judge.on_delivered(0, message(4), position(4))
    judge.on_delivered(1, message(4), position(5))


def acknowledged_with_another_position(judge: DeliveryJudge) -> None:
    judge.on_settled(message(4), Outcome.ACKNOWLEDGED, position(7))
    for subscriber in (0, 1):
        deliver(judge, subscriber, 4)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("plant", "lost", "doubled", "reordered"),
    [
        (lost_at_one_subscriber, 1, 0, 0),
        (lost_at_all_subscribers, 2, 0, 0),
        (unconfirmed_and_delivered_to_one, 1, 0, 0),
        (delivered_twice, 0, 1, 0),
        (delivered_twice_at_two_positions, 0, 1, 0),
        (unconfirmed_and_delivered_twice, 0, 1, 0),
        (refused_and_delivered, 0, 1, 0),
        (delivered_and_refused, 0, 1, 0),
        (out_of_the_order_of_the_publisher, 0, 0, 2),
        (out_of_the_order_of_positions, 0, 0, 1),
        (at_two_positions, 0, 0, 1),
        (acknowledged_with_another_position, 0, 0, 2),
    ],
)
def test_each_kind_of_fault_is_found(plant: Plant, lost: int, doubled: int, reordered: int) -> None:
    verdict = verdict_of(plant)
    assert (verdict.lost, verdict.doubled, verdict.reordered) == (lost, doubled, reordered)
    assert not verdict.is_clean
    assert len(verdict.examples) == lost + doubled + reordered


@pytest.mark.fast
def test_a_run_without_an_acknowledged_message_is_not_clean() -> None:
    assert not DeliveryJudge(1).verdict().is_clean


@pytest.mark.fast
def test_nothing_is_kept_of_messages_that_all_subscribers_received() -> None:
    judge = DeliveryJudge(2)
    for number in range(1, 1_000):
        publish(judge, number)
        for subscriber in (0, 1):
            deliver(judge, subscriber, number)
    assert not judge._places
    assert not any(stream.missing for stream in judge._streams.values())


# The command


async def test_verify_is_clean_while_a_replica_is_killed_and_the_other_is_restarted(
    tmp_path: Path, relay_with: StartRelay
) -> None:
    file = tmp_path / "verify.json"
    async with RedisBroker(needed(*ANY_REDIS), tmp_path / "broker") as broker:
        settings = {"backplane": {"url": broker.url}, "shutdown": {"spread_s": 0}}
        ports = [free_port(), free_port()]
        replicas = [relay_with(server={"port": port}, **settings) for port in ports]
        urls = [replica.ws_url() for replica in replicas]
        async with running("verify", *SMALL, "--json", str(file), *urls) as command:
            assert "connected to" in await command.next_notice()
            for index, number in enumerate((signal.SIGKILL, signal.SIGTERM)):
                replica = replicas[index]
                await replica.await_metric_at_least("websocket_messages_total", 50)
                await replica.stop(number)
                replicas[index] = relay_with(server={"port": ports[index]}, **settings)
            await replicas[0].await_metric_at_least("websocket_messages_total", 50)
            command.process.send_signal(signal.SIGINT)
            done = await command.finish()
    assert (done.exit_code, done.stderr) == (0, ""), done.stdout
    result = json.loads(file.read_text())
    assert (result["lost"], result["doubled"], result["reordered"]) == (0, 0, 0)
    assert (result["unconfirmed"], result["refused"]) == (0, 0)
    assert result["published"] == result["acknowledged"] > 150
    assert result["reconnections"] >= 5
    assert 0 < result["reconnection_median_s"] <= result["reconnection_longest_s"]
    assert 0 < result["latency_ms"]["p50"] <= result["latency_ms"]["max"]
    assert f"{result['published']:,}" in done.stdout


async def test_verify_finds_messages_that_the_relay_lost(relay_with: StartRelay) -> None:
    relay = relay_with(history={"max_messages": 2})
    async with TcpProxy(relay.port) as proxy:
        urls = (proxy.url(), relay.ws_url(), relay.ws_url())  # of a subscriber each, a publisher
        load = ("--clients", "2", "--publishers", "1", "--channels", "1", "--rate", "200")
        async with running("verify", *load, *urls) as command:
            await relay.await_metric_at_least("websocket_messages_total", 20)
            proxy.stall()
            await proxy.await_lost_bytes()
            await relay.await_metric_at_least("websocket_messages_total", 100)
            proxy.cut()
            await relay.await_metric_at_least("websocket_messages_total", 200)
            command.process.send_signal(signal.SIGINT)
            done = await command.finish()
    assert done.exit_code == 1
    assert "lost at subscriber 0" in done.stdout
    assert "lost at subscriber 1" not in done.stdout


class RepeatingProxy(TcpProxy):
    """A proxy that delivers messages twice."""

    def on_response(self, data: bytes, connection: ProxiedConnection) -> bytes:
        return data * 2 if b'"channel":"verify' in data and b"HTTP/1.1" not in data else data


async def test_verify_finds_messages_that_are_delivered_twice(relay: RelayProcess) -> None:
    async with RepeatingProxy(relay.port) as proxy:
        load = ("--clients", "1", "--publishers", "1", "--rate", "20", "--seconds", "0.5")
        done = await run_client("verify", *load, proxy.url())
    assert done.exit_code == 1
    assert "twice at subscriber 0" in done.stdout


async def test_verify_shows_its_progress_on_a_terminal(relay: RelayProcess, channel: str) -> None:
    with pseudo_terminal() as (screen, program_side):
        load = (*SMALL, "--channel", channel, "--seconds", "1")
        async with running("verify", *load, relay.ws_url(), stderr=program_side) as command:
            done = await command.finish()
        shown = os.read(screen, 65_536).decode()
    assert done.exit_code == 0
    assert " published  " in shown
    assert "5 of 5 connected" in shown
    assert max(map(len, shown.split("\r\x1b[K"))) < 80
    assert shown.endswith("\r\x1b[K")
    assert "latency p50" in done.stdout


async def test_verify_fails_if_no_message_is_acknowledged(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_message_bytes": 1})
    done = await run_client("verify", *SMALL, "--seconds", "0.3", relay.ws_url())
    assert done.exit_code == 1
    assert done.error_lines[1:] == ["websocket-relay: no message was acknowledged"]
