"""Serve the certificate that is on disk now, and make one for a developer's machine."""

import asyncio
import contextlib
import datetime
import errno
import ipaddress
import logging
import os
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from websocket_relay.outcomes import SettingsError, StartError

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often the files are looked at. A look is two stat calls; watching for events would miss the
way in which Kubernetes swaps a mounted Secret (a link in the folder above)."""

DEV_NAME = "websocket-relay dev"
DEV_DAYS = 365


class Certificates:
    """The pair of files that is served.

    New handshakes get the newest pair that was whole; open connections keep theirs. The context
    that listens stays: its server-name callback, which is called with and without a name, puts the
    current one in its place for each handshake. Loading a new pair into the one that listens would
    do, too, but a key that does not match would leave it with half of each.

    Args:
        cert_file: the chain, PEM.
        key_file: its private key, PEM.

    Raises:
        SettingsError: the pair can't be served.
    """

    def __init__(self, cert_file: Path, key_file: Path) -> None:
        self._files = (cert_file, key_file)
        self._seen = self._state()
        self.reloads = {"ok": 0, "error": 0}
        try:
            self._current, self.expiry = self._load()
        except (OSError, ValueError) as error:
            raise SettingsError([self._problem(error)]) from None
        self.context = self._current
        self.context.sni_callback = self._choose

    async def watch(self) -> None:
        """Take up renewed pairs, for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            if (state := self._state()) != self._seen:
                self._seen = state
                try:
                    self._renew()
                except Exception:  # the edge of a task whose end would end the relay
                    self.reloads["error"] += 1
                    log.exception("certificate not renewed")

    def _renew(self) -> None:
        try:
            self._current, self.expiry = self._load()
        except (OSError, ValueError) as error:
            self.reloads["error"] += 1
            log.error("certificate not renewed", extra={"error": self._problem(error)})
            return
        self.reloads["ok"] += 1
        expires = datetime.datetime.fromtimestamp(self.expiry, datetime.UTC).isoformat()
        log.info("certificate renewed", extra={"file": str(self._files[0]), "expires": expires})

    def _load(self) -> tuple[ssl.SSLContext, float]:
        cert_file, key_file = self._files
        for file in self._files:
            if not file.is_file():  # a FIFO, say, would be waited for
                raise FileNotFoundError(errno.ENOENT, "no such file", str(file))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        key_file.open("rb").close()  # OpenSSL does not say which of the two it could not open
        try:
            certificate = x509.load_pem_x509_certificate(cert_file.read_bytes())
        except (x509.InvalidVersion, UnsupportedAlgorithm) as error:
            raise ValueError(str(error)) from None
        # A key with a passphrase is an error, not a question on the terminal.
        context.load_cert_chain(cert_file, key_file, password=lambda: b"")
        return context, certificate.not_valid_after_utc.timestamp()

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._current

    def _state(self) -> list[tuple[int, int, int] | None]:
        states: list[tuple[int, int, int] | None] = []
        for file in self._files:
            try:
                stat = file.stat()
                states.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
            except (OSError, ValueError):  # a name with a NUL byte in it is a ValueError
                states.append(None)
        return states

    def _problem(self, error: Exception) -> str:
        cert_file, key_file = self._files
        if isinstance(error, OSError) and error.filename:
            key = "cert_file" if str(error.filename) == str(cert_file) else "key_file"
            return f"server.tls.{key}: {error.filename}: {error.strerror}"
        reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else str(error)
        words = reason.replace("_", " ").lower()
        return f"server.tls: {cert_file} and {key_file} can't be served: {words}"


def write_dev_pair(directory: Path) -> tuple[Path, Path]:
    """Write a self-signed cert.pem and key.pem for localhost, 127.0.0.1 and ::1.

    Args:
        directory: where to; made if it is not there.

    Raises:
        StartError: the files can't be written, or there are some that this did not make.
    """
    cert_file, key_file = directory / "cert.pem", directory / "key.pem"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (cert_file.exists() or key_file.exists()) and not _is_ours(cert_file):
            raise StartError(
                f"{cert_file} or {key_file} is there and is no development certificate;"
                " move them away or choose another --directory"
            )
        certificate, key = _make_pair()
        _replace(key_file, key, mode=0o600)
        _replace(cert_file, certificate, mode=0o644)
    except OSError as error:
        raise StartError(f"{error.filename or directory}: {error.strerror}") from None
    return cert_file, key_file


def _make_pair() -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, DEV_NAME)])
    now = datetime.datetime.now(datetime.UTC)
    names = [
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.IPAddress(ipaddress.ip_address("::1")),
    ]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=DEV_DAYS))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return (
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def _is_ours(cert_file: Path) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(cert_file.read_bytes())
    except (OSError, ValueError):
        return False
    names = certificate.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
    return [name.value for name in names] == [DEV_NAME]


def _replace(file: Path, content: bytes, *, mode: int) -> None:
    """Write a file so that a reader sees the old or the new one, and only those who may."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
            out.write(content)
        draft.replace(file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
