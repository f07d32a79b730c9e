"""Private names of the brokers' libraries that the relay uses: a new version may lack them."""

from types import FunctionType

import pytest
from nats.aio.client import Client
from nats.aio.transport import TcpTransport
from redis.asyncio import Connection
from websocket_relay.backplane.nats import QuietNatsClient, TlsNatsClient

pytestmark = pytest.mark.fast


def private_names_in(*classes: type) -> set[str]:
    """Return the private names that the methods and properties of classes use."""
    members = [each for kind in classes for each in vars(kind).values()]
    functions = [each.fget if isinstance(each, property) else each for each in members]
    codes = [each.__code__ for each in functions if isinstance(each, FunctionType)]
    return {name for code in codes for name in code.co_names if name.startswith("_")}


def test_the_libraries_of_brokers_have_the_private_names_that_are_used() -> None:
    names = private_names_in(QuietNatsClient, TlsNatsClient)
    assert "_server_info" in names
    assert names <= set(dir(Client()))
    assert "_io_writer" in TcpTransport.__init__.__code__.co_names
    assert hasattr(Connection(), "_writer")
