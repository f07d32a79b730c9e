"""What `helm test` runs in the relay's image: two clients exchange messages, in one order.

RELAY_TEST_URL is the URL of the relay. The chart's templates/tests/round-trip.yaml sets
the other variables. Knows no Kubernetes and no server code.
"""

import asyncio
import os
import ssl
import sys
import time
import uuid

import jwt
from websocket_relay.client import RejectedError, Relay
from websocket_relay.outcomes import RelayError

TIMEOUT_S = 60
CHANNEL = f"helm-test-{uuid.uuid4().hex}"


def tls_context() -> ssl.SSLContext | None:
    """Return a context that trusts only the certificate in the Secret.

    The certificate is for the public host names, not for the Service's, so no name is checked.
    """
    file = os.environ.get("RELAY_TEST_CERTIFICATE")
    if file is None:
        return None
    context = ssl.create_default_context(cafile=file)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def token() -> str:
    """Return a token for this channel, valid for one minute, or the given one."""
    secret = os.environ.get("RELAY_TEST_SECRET")
    if secret is None:
        return os.environ.get("RELAY_TEST_TOKEN", "").strip()
    claims = {
        "exp": int(time.time()) + TIMEOUT_S,
        os.environ["RELAY_TEST_CLAIM"]: {"subscribe": [CHANNEL], "publish": [CHANNEL]},
    }
    for claim in ("aud", "iss"):
        if value := os.environ.get(f"RELAY_TEST_{claim.upper()}"):
            claims[claim] = value
    return jwt.encode(claims, secret, algorithm=os.environ["RELAY_TEST_ALGORITHM"])


def client() -> Relay:
    """Return a client of the relay."""
    url = os.environ["RELAY_TEST_URL"]
    return Relay(url, token=token(), ssl=tls_context(), start_patience_s=TIMEOUT_S)


async def round_trip() -> None:
    """Check that two clients receive each other's messages in the same order."""
    sent = {"from one", "from the other"}
    async with client() as one, client() as other:
        subscriptions = [each.subscribe(CHANNEL, history=len(sent)) for each in (one, other)]
        await one.publish(CHANNEL, "from one")
        await other.publish(CHANNEL, "from the other")
        received = [[(await anext(each)).data for _ in sent] for each in subscriptions]
    if set(received[0]) != sent or received[0] != received[1]:
        raise SystemExit(f"one client received {received[0]}, the other {received[1]}")
    print("two clients receive each other's messages, in one order")


async def rejection() -> None:
    """Check that a client without a token is rejected."""
    try:
        async with client():
            raise SystemExit("a client without a token was accepted")
    except RejectedError as error:
        print(f"a client without a token is rejected: {error}")


async def main() -> None:
    """Run the test that is possible with the given variables."""
    expects_rejection = os.environ.get("RELAY_TEST_REFUSED") == "true"
    async with asyncio.timeout(TIMEOUT_S):
        await (rejection() if expects_rejection else round_trip())


try:
    asyncio.run(main())
except RelayError as error:
    sys.exit(f"round trip failed: {error}")
except TimeoutError:
    sys.exit("round trip failed: timed out")
