"""Create real certificates for TLS. Knows no relay."""

import datetime
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True, slots=True)
class CertificatePair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    @property
    def serial_number(self) -> int:
        return self.certificate.serial_number

    @property
    def expiry_timestamp_s(self) -> float:
        return self.certificate.not_valid_after_utc.timestamp()

    def write_to(self, directory: Path) -> None:
        """Write cert.pem and key.pem, each atomically."""
        replace_file(directory / "cert.pem", self.certificate_pem)
        replace_file(directory / "key.pem", self.key_pem)

    def client_context(self) -> ssl.SSLContext:
        """Return a client's context that trusts this certificate only."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.certificate_pem.decode())
        return context


def make_pair(
    *,
    valid_days: int = 30,
    issuer: CertificatePair | None = None,
    subject: str = "CN=localhost",
) -> CertificatePair:
    """Create a certificate for localhost, 127.0.0.1 and ::1; without an issuer self-signed.

    Args:
        subject: as RFC 4514 writes it.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name.from_rfc4514_string(subject)
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    names = x509.SubjectAlternativeName(
        [
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
            x509.IPAddress(ipaddress.ip_address("::1")),
        ]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.certificate.subject if issuer else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=valid_days))
        .add_extension(names, critical=False)
        .sign(issuer.key if issuer else key, hashes.SHA256())
    )
    return CertificatePair(certificate, key)


def make_home_made_ca() -> CertificatePair:
    """Create a CA as short recipes do: without keyUsage and key identifiers."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "home-made CA")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=False)
        .sign(key, hashes.SHA256())
    )
    return CertificatePair(certificate, key)


def replace_file(file: Path, content: bytes) -> None:
    """Write a file atomically: a reader finds the old content or the new one."""

    temporary = file.with_suffix(".new")
    temporary.write_bytes(content)
    temporary.replace(file)
