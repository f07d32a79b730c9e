"""What `helm test` runs in the relay's image: two clients hear each other, in one order.

RELAY_TEST_URL is the address, ending where the channel's name belongs. For the rest see the chart's
templates/tests/round-trip.yaml.
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

PATIENCE_S = 60
CHANNEL = f"helm-test-{uuid.uuid4().hex}"


def trust() -> ssl.SSLContext | None:
    """Return what trusts the certificate in the Secret, and no other.

    It is for the names that clients use, and not for the Service's.
    """
    file = os.environ.get("RELAY_TEST_CERTIFICATE")
    if file is None:
        return None
    context = ssl.create_default_context(cafile=file)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def token() -> str:
    """Return a token that is good for this channel and a minute, or the one that was given."""
    secret = os.environ.get("RELAY_TEST_SECRET")
    if secret is None:
        return os.environ.get("RELAY_TEST_TOKEN", "").strip()
    claims = {
        "exp": int(time.time()) + PATIENCE_S,
        "relay": {"subscribe": [CHANNEL], "publish": [CHANNEL]},
    }
    for claim in ("aud", "iss"):
        if value := os.environ.get(f"RELAY_TEST_{claim.upper()}"):
            claims[claim] = value
    return jwt.encode(claims, secret, algorithm=os.environ["RELAY_TEST_ALGORITHM"])


def client() -> Relay:
    """Return a client of the test's channel."""
    url = os.environ["RELAY_TEST_URL"] + CHANNEL
    return Relay(url, token=token(), ssl=trust(), start_patience_s=PATIENCE_S)


async def round_trip() -> None:
    """Let two clients say something, and both hear both."""
    said = {"from one", "from the other"}
    async with client() as one, client() as other:
        await one.send("from one")
        await other.send("from the other")
        heard = [[(await anext(each)).data for _ in said] for each in (one, other)]
    if set(heard[0]) != said or heard[0] != heard[1]:
        raise SystemExit(f"one client heard {heard[0]}, the other {heard[1]}")
    print("two clients hear each other, in one order")


async def refusal() -> None:
    """See that nobody comes in without a token."""
    try:
        async with client():
            raise SystemExit("a client without a token was let in")
    except RejectedError as denied:
        print(f"nobody comes in without a token: {denied}")


async def main() -> None:
    """Do what can be done with what is known."""
    nobody_comes_in = os.environ.get("RELAY_TEST_REFUSED") == "true"
    async with asyncio.timeout(PATIENCE_S):
        await (refusal() if nobody_comes_in else round_trip())


try:
    asyncio.run(main())
except RelayError as error:
    sys.exit(f"no round trip: {error}")
except TimeoutError:
    sys.exit("no round trip: not in time")
