"""Give connections their identities. Knows no message."""

import time

from websocket_relay.admission.policy import ConnectionAccess
from websocket_relay.identity import ClientIdentity, new_client_id


def identity_of(
    access: ConnectionAccess, address: str | None, client_id: str = ""
) -> ClientIdentity:
    """Return who a client is.

    Args:
        access: of the client.
        address: of its machine; None: it is not known.
        client_id: of its session; empty: it has none.
    """
    client = client_id or new_client_id()
    since = round(time.time(), 3)
    may_return = bool(client_id)
    return ClientIdentity(client, access.user, access.info, may_return, since, address or "")
