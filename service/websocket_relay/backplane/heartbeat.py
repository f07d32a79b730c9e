"""Own the heartbeats: the one of this replica in flight, and the latest one of each replica.

A heartbeat is a mark on a packet. A replica appends one each second, and waits to read it back.
Knows no stream and no message.
"""

import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from websocket_relay.backplane.codec import MAX_PRODUCERS

TIMESTAMP = struct.Struct("<d")
"""First field of a heartbeat: when it was sent, by the monotonic clock of its producer. The
description of the replica follows."""


class Heartbeats:
    """The heartbeats of all replicas.

    Args:
        describe: returns the description of this replica for the others, in a few bytes.
        observe_lag: receives the seconds from the start of a heartbeat until it is read back.
        replica_timeout_s: a replica without a heartbeat in this time is not alive any more.

    Attributes:
        sent_at: when the heartbeat of this replica that is in flight was sent; 0: none is in
            flight.
        complete_until: when the latest heartbeat that was read back was sent: entries that were
            appended before have been read.
    """

    def __init__(
        self,
        describe: Callable[[], bytes],
        observe_lag: Callable[[float], None],
        replica_timeout_s: float,
    ) -> None:
        self._describe = describe
        self._observe_lag = observe_lag
        self._replica_timeout_s = replica_timeout_s
        self.sent_at = self.complete_until = 0.0
        # By replica: when the latest heartbeat was read, and its description.
        self._replicas: OrderedDict[int, tuple[float, bytes]] = OrderedDict()

    def start_heartbeat(self, now: float) -> bytes:
        """Return a heartbeat to append. It replaces the one in flight, if there is one."""
        self.sent_at = now
        return TIMESTAMP.pack(now) + self._describe()

    def record_heartbeat(self, replica: int, heartbeat: bytes) -> None:
        """Record a heartbeat of any replica: that replica is alive."""
        replicas = self._replicas
        replicas[replica] = time.monotonic(), heartbeat[TIMESTAMP.size :]
        replicas.move_to_end(replica)
        if len(replicas) > MAX_PRODUCERS:
            replicas.popitem(last=False)

    def record_own_heartbeat(self, heartbeat: bytes) -> None:
        """Record that a heartbeat of this replica was read back."""
        if len(heartbeat) >= TIMESTAMP.size:
            self.complete_until = max(self.complete_until, *TIMESTAMP.unpack_from(heartbeat))
        if self.sent_at:
            self._observe_lag(time.monotonic() - self.sent_at)
            self.sent_at = 0.0

    def replicas(self) -> Sequence[bytes]:
        """Return the descriptions of the replicas with a recent heartbeat, this one included."""
        since = time.monotonic() - self._replica_timeout_s
        return [description for read_at, description in self._replicas.values() if read_at > since]
