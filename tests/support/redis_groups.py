"""Run several Redis servers as one broker: with Sentinels, or as a Cluster. Knows no relay."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import redis.asyncio as redis

from tests.support.brokers import Broker, RedisBroker, free_port, is_free
from tests.support.relay_process import eventually

SERVICE = "relay-log"
SLOTS = 16_384

TLS_OF_SERVERS = ("tls-replication yes", "tls-ca-cert-file cert.pem")


class GroupedRedis(RedisBroker):
    """A Redis with further lines in its settings."""

    def __init__(self, *arguments: Any, lines: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lines = [*lines, *(TLS_OF_SERVERS if self.pair else ())]

    def _arguments(self) -> list[str]:
        (name,) = super()._arguments()
        with Path(name).open("a") as file:
            file.writelines(f"\n{line}" for line in self._lines)
        return [name]

    async def execute(self, *command: Any) -> Any:
        """Run a command; return its reply."""
        client = redis.Redis.from_url(self.url)
        client.response_callbacks.clear()
        try:
            return await client.execute_command(*command)  # type: ignore[no-untyped-call]
        finally:
            await client.aclose()

    async def await_reply(self, *command: str, contains: str) -> None:
        """Run a command until a text is in its reply."""

        async def reply() -> tuple[bool, object]:
            replied = str(await self.execute(*command))
            return contains in replied, replied

        await eventually(reply, f"{contains} in the reply")


class RedisSentinel(GroupedRedis):
    """A Sentinel that alone decides about a failover, after a second."""

    def __init__(self, *arguments: Any, primary: Broker, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._primary = primary

    def _arguments(self) -> list[str]:
        lines = [
            f"port {0 if self.pair else self.port}",
            f"sentinel monitor {SERVICE} 127.0.0.1 {self._primary.port} 1",
            f"sentinel auth-pass {SERVICE} {self._primary.password}",
            f"sentinel down-after-milliseconds {SERVICE} 1000",
            f"sentinel failover-timeout {SERVICE} 2000",
            f"requirepass {self.password}",
        ]
        if self.pair:
            lines += [f"tls-port {self.port}", "tls-cert-file cert.pem", "tls-key-file key.pem"]
            lines += ["tls-auth-clients no", *TLS_OF_SERVERS]
        file = self.directory / "sentinel.conf"
        file.write_text("\n".join(lines))
        return [str(file), "--sentinel"]


class SentinelGroup:
    """A primary, a replica of it, and a Sentinel; all of them with passwords."""

    def __init__(self, program: Path, directory: Path, **options: Any) -> None:
        def server(name: str, *lines: str) -> GroupedRedis:
            lines = ("masterauth of-redis", "repl-diskless-sync-delay 0", *lines)
            return GroupedRedis(
                program, directory / name, lines=lines, password="of-redis", **options
            )

        self.primary = server("primary")
        self.replica = server("replica", f"replicaof 127.0.0.1 {self.primary.port}")
        self.sentinel = RedisSentinel(
            program, directory / "sentinel", primary=self.primary, password="of-sentinel", **options
        )

    async def start(self, stack: AsyncExitStack) -> None:
        """Start the servers, and wait until a failover is possible."""
        await stack.enter_async_context(self.primary)
        await stack.enter_async_context(self.replica)
        await self.replica.await_reply("ROLE", contains="b'connected'")
        await stack.enter_async_context(self.sentinel)
        await self.sentinel.await_reply(
            "SENTINEL", "REPLICAS", SERVICE, contains=str(self.replica.port)
        )

    async def stop_replication(self) -> None:
        """Freeze the replica, and let it miss what the primary stores from now on."""
        self.replica.freeze()
        await self.primary.execute("CLIENT", "KILL", "TYPE", "replica")


class ClusterNode(GroupedRedis):
    """A Redis whose port for the other nodes, 10,000 above its own, is free, too.

    Neither is an ephemeral port: those begin at 32,768.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        while self.port >= 22_768 or not is_free(self.port + 10_000):
            self.port = free_port()


class RedisCluster:
    """Three nodes with a third of the slots each, and a replica of the one that has a key."""

    def __init__(self, program: Path, directory: Path, key: str) -> None:
        lines = ("cluster-enabled yes", "cluster-node-timeout 2000", "repl-diskless-sync-delay 0")
        self.nodes = [
            ClusterNode(program, directory / str(number), lines=lines) for number in range(4)
        ]
        self._key = key

    @property
    def url(self) -> str:
        """The URL of all nodes."""
        return f"redis+cluster://{','.join(f'127.0.0.1:{node.port}' for node in self.nodes)}"

    async def start(self, stack: AsyncExitStack) -> None:
        """Start the nodes; `holder` has the key, and `replica` follows it."""
        for node in self.nodes:
            await stack.enter_async_context(node)
        *primaries, self.replica = self.nodes
        self.slot = int(await self.replica.execute("CLUSTER", "KEYSLOT", self._key))
        self.holder = primaries[self.slot * 3 // SLOTS]
        for number, node in enumerate(primaries):
            slots = (each for each in range(SLOTS) if each * 3 // SLOTS == number)
            await node.execute("CLUSTER", "ADDSLOTS", *slots)
            await node.execute("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in primaries:
            await self.replica.execute("CLUSTER", "MEET", "127.0.0.1", node.port)
        for node in self.nodes:
            await node.await_reply("CLUSTER", "INFO", contains="cluster_known_nodes:4")
        holder_id = await self.holder.execute("CLUSTER", "MYID")
        await self.replica.execute("CLUSTER", "REPLICATE", holder_id)
        for node in self.nodes:
            await node.await_reply("CLUSTER", "INFO", contains="cluster_state:ok")
        await self.replica.await_reply("ROLE", contains="b'connected'")
