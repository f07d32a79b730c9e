"""Reload the TLS certificate when its files change, and create one for development.

Knows no port and no connection.
"""

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

from websocket_relay.counters import Values
from websocket_relay.outcomes import SettingsError, StartError
from websocket_relay.watched_files import WatchedFiles

log = logging.getLogger(__name__)

SESSION_TICKETS = 1
"""Tickets that a client gets in a handshake with TLS 1.3. One is enough to resume the session."""

DEV_NAME = "websocket-relay dev"
DEV_DAYS = 365


class ClientCaError(ValueError):
    """The file of client authorities holds no certificates."""


class Certificates:
    """The certificate and key in use, and their reload.

    New handshakes use the newest valid pair; open connections keep theirs.

    Args:
        cert_file: the chain, PEM.
        key_file: its private key, PEM.
        client_ca_file: the authorities of client certificates, PEM; None: clients need none.

    Raises:
        SettingsError: the pair or the authorities can't be loaded.

    Attributes:
        context: the newest valid pair.
        expiry: when its certificate expires, in seconds since 1970.
        reloads: the number of reloads by result.
    """

    def __init__(self, cert_file: Path, key_file: Path, client_ca_file: Path | None = None) -> None:
        self._files = (cert_file, key_file, *([client_ca_file] if client_ca_file else []))
        self._watched = WatchedFiles(lambda: self._files)  # before the files are read
        self.reloads = {"ok": 0, "error": 0}
        try:
            self.context, self.expiry = self._load()
        except (OSError, ValueError) as error:
            raise SettingsError([self._problem(error)]) from None

    def metrics(self) -> Values:
        """Return the values of the metrics of the certificate."""
        return {
            "tls_certificate_expiry_timestamp_seconds": self.expiry,
            "tls_reloads": self.reloads,
        }

    async def run(self) -> None:
        """Reload each renewed pair, until cancelled."""
        while True:
            await self._watched.wait_for_change()
            try:
                self._reload()
            except Exception:  # the task's edge: an error here would end the relay
                self.reloads["error"] += 1
                log.exception("certificate not renewed")

    def _reload(self) -> None:
        try:
            self.context, self.expiry = self._load()
        except (OSError, ValueError) as error:
            self.reloads["error"] += 1
            log.error("certificate not renewed", extra={"error": self._problem(error)})
            return
        self.reloads["ok"] += 1
        expires = datetime.datetime.fromtimestamp(self.expiry, datetime.UTC).isoformat()
        log.info("certificate renewed", extra={"file": str(self._files[0]), "expires": expires})

    def _load(self) -> tuple[ssl.SSLContext, float]:
        cert_file, key_file, *client_ca_files = self._files
        for file in self._files:
            if not file.is_file():  # opening a FIFO, for example, would block
                raise FileNotFoundError(errno.ENOENT, "no such file", str(file))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        key_file.open("rb").close()  # OpenSSL does not report which of the two it could not open
        try:
            certificate = x509.load_pem_x509_certificate(cert_file.read_bytes())
        except (x509.InvalidVersion, UnsupportedAlgorithm) as error:
            raise ValueError(str(error)) from None
        # A key with a passphrase is an error; without `password`, OpenSSL prompts on the terminal.
        context.load_cert_chain(cert_file, key_file, password=lambda: b"")
        context.num_tickets = SESSION_TICKETS
        for file in client_ca_files:
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(file)
            except ssl.SSLError as error:
                raise ClientCaError(_words(str(error.reason))) from None
        return context, certificate.not_valid_after_utc.timestamp()

    def _problem(self, error: Exception) -> str:
        cert_file, key_file, *client_ca_files = self._files
        if isinstance(error, ClientCaError):
            return f"server.tls.client_ca_file: {client_ca_files[0]}: {error}"
        if isinstance(error, OSError) and error.filename:
            names = ("cert_file", "key_file", "client_ca_file")
            key = names[list(map(str, self._files)).index(str(error.filename))]
            return f"server.tls.{key}: {error.filename}: {error.strerror}"
        reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else str(error)
        return f"server.tls: can't load {cert_file} and {key_file}: {_words(reason)}"


def _words(reason: str) -> str:
    """Return OpenSSL's name of an error in words."""
    return reason.replace("_", " ").lower()


def write_dev_pair(directory: Path) -> tuple[Path, Path]:
    """Write a self-signed cert.pem and key.pem for localhost, 127.0.0.1 and ::1.

    Args:
        directory: the target directory, created if missing.

    Raises:
        StartError: the files can't be written, or exist and were not created by this function.
    """
    cert_file, key_file = directory / "cert.pem", directory / "key.pem"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (cert_file.exists() or key_file.exists()) and not _is_dev_certificate(cert_file):
            raise StartError(
                f"{cert_file} or {key_file} exists and is not a development certificate;"
                " remove them or choose another --directory"
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


def _is_dev_certificate(cert_file: Path) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(cert_file.read_bytes())
    except (OSError, ValueError):
        return False
    names = certificate.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
    return [name.value for name in names] == [DEV_NAME]


def _replace(file: Path, content: bytes, *, mode: int) -> None:
    """Replace a file atomically; the new one has the given permissions from the start."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
            out.write(content)
        temporary.replace(file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
