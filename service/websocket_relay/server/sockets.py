"""Open the sockets that the relay listens on. Knows no protocol and no settings tree."""

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from websocket_relay.config.model import ALL_ADDRESSES
from websocket_relay.outcomes import ListenError

LISTEN_BACKLOG = 4096
"""Length of the kernel's accept queue; the kernel caps it at net.core.somaxconn."""

SOCKET_UMASK = 0o117
"""A Unix socket is for the user and the group of the relay."""

FREE_PORT_ATTEMPTS = 10
"""Port 0: a port that is free for one address may be in use at another one."""

PORT_ERRORS = (errno.EADDRINUSE, errno.EACCES, errno.EPERM)
"""Errors that another port avoids; all others need another host."""

NO_SUCH_ADDRESS = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)

SocketAddress = tuple[Any, ...]
"""As `getaddrinfo` returns it. IPv6: also the scope, which a link-local address needs."""


@dataclass(frozen=True, slots=True)
class ListeningAddress:
    """Where a port listens.

    Attributes:
        host: the addresses, separated by commas; or the path of a Unix socket.
        port: None: it is a Unix socket.
    """

    host: str
    port: int | None


def tcp_sockets(section: str, hosts: str, port: int) -> list[socket.socket]:
    """Open a socket for each address.

    For a name or all addresses, one available family is enough.

    Args:
        section: of the settings that contain `host` and `port`, for errors.
        hosts: names and addresses, separated by commas; `*` and `::` stand for all addresses.
        port: 0 selects a free one, the same for all addresses.

    Raises:
        ListenError: an address can't be bound.
    """
    for attempt in range(1, FREE_PORT_ATTEMPTS + 1):
        try:
            return _bind_all(hosts, port)
        except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
            code = error.errno if isinstance(error, OSError) else None
            if port == 0 and code == errno.EADDRINUSE and attempt < FREE_PORT_ATTEMPTS:
                continue
            reason = os.strerror(code) if code and code > 0 else str(error)
            setting = f"{section}.port" if code in PORT_ERRORS else f"{section}.host"
            text = f"can't listen on {hosts} port {port}: {reason}"
            raise ListenError(setting, text) from None
    raise AssertionError("unreachable")


def _bind_all(hosts: str, port: int) -> list[socket.socket]:
    with contextlib.ExitStack() as stack:
        bound: list[socket.socket] = []
        missing: OSError | None = None
        for family, address, is_required in _addresses(hosts.split(",")):
            try:
                opened = _bind(family, address, bound[0].getsockname()[1] if bound else port)
            except OSError as error:
                if is_required or error.errno not in NO_SUCH_ADDRESS:
                    raise
                missing = error
            else:
                bound.append(stack.enter_context(opened))
        if missing is not None and not bound:
            raise missing
        stack.pop_all()
        return bound


def _addresses(hosts: Iterable[str]) -> Iterator[tuple[socket.AddressFamily, SocketAddress, bool]]:
    """Yield each address once, and whether the machine has to have it."""
    found: dict[tuple[socket.AddressFamily, SocketAddress], bool] = {}
    for host in map(str.strip, hosts):
        if host in ALL_ADDRESSES:
            # A socket for each family: on a shared one, IPv4 peers would have IPv6 addresses.
            found[socket.AF_INET6, ("::", 0, 0, 0)] = found[socket.AF_INET, ("0.0.0.0", 0)] = False
            continue
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, sockaddr in infos:
            found.setdefault((family, sockaddr), is_ip_address(host))
    for (address_family, address), is_required in found.items():
        yield address_family, address, is_required


def is_ip_address(host: str) -> bool:
    """Return whether a host is an IP address and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _bind(family: socket.AddressFamily, address: SocketAddress, port: int) -> socket.socket:
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind((address[0], port, *address[2:]))
        opened.listen(LISTEN_BACKLOG)
    except BaseException:
        opened.close()
        raise
    return opened


@contextlib.contextmanager
def unix_socket(path: Path) -> Iterator[socket.socket]:
    """Listen on a Unix socket; remove its file at the end.

    The file that a killed relay has left is replaced.

    Raises:
        ListenError: the socket can't be bound, or another process listens on it.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        umask = os.umask(SOCKET_UMASK)
        try:
            listening.bind(str(path))
        finally:
            os.umask(umask)
        listening.listen(LISTEN_BACKLOG)
        bound = path.stat()
    except OSError as error:
        listening.close()
        raise ListenError("server.socket", f"{path}: {error.strerror or error}") from None
    try:
        yield listening
    finally:
        with contextlib.suppress(OSError):
            if path.stat().st_ino == bound.st_ino:  # not the file of another relay
                path.unlink()


def _remove_stale(path: Path) -> None:
    """Remove the file of a socket on which no process listens.

    Raises:
        OSError: it is another file, or a process listens.
    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EEXIST, "exists and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:  # its accept queue is full
            pass
    raise OSError(errno.EADDRINUSE, "another process listens on it")


def inherited_socket(descriptor: int) -> socket.socket:
    """Return the listening socket that the parent process has passed on, as systemd does.

    Raises:
        ListenError: the descriptor is not a listening socket.
    """
    reason = "is not a listening socket"
    try:
        inherited = socket.socket(fileno=descriptor)
    except OSError as error:
        is_closed = error.errno == errno.EBADF
        reason = "was not inherited" if is_closed else reason
    else:
        if inherited.type == socket.SOCK_STREAM and inherited.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN
        ):
            return inherited
        inherited.detach()
    raise ListenError("server.socket", f"file descriptor {descriptor} {reason}")
