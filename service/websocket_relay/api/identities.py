"""Give connections their identities. Knows no message."""

import time

from websocket_relay.admission.policy import ConnectionAccess
from websocket_relay.identity import ClientIdentity, new_client_id


def identity_of(access: ConnectionAccess, client_id: str = "") -> ClientIdentity:
    """Return who a client is.

    Args:
        access: of the client.
        client_id: of its session; empty: it has none.
    """
    client = client_id or new_client_id()
    since = round(time.time(), 3)
    return ClientIdentity(client, access.user, access.info, bool(client_id), since)
