"""Own the access to a broker: credentials and certificates, and whether they fit its URL.

Files are read anew for each connection: a renewed certificate or password needs no restart. Knows
no library and no connection.
"""

import re
import ssl
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from websocket_relay.outcomes import UnusableSettingError
from websocket_relay.redaction import unusable_url
from websocket_relay.secret_files import SecretFileError, read_secret
from websocket_relay.trust import verifying_context

TLS_PARAMETERS = {
    "ca_file": "ssl_ca_certs",
    "cert_file": "ssl_certfile",
    "key_file": "ssl_keyfile",
}
"""The parameters of a URL that name the same files as these settings, by setting."""

CREDENTIAL_SETTINGS = ("password", "password_file", "creds_file", "nkey_file")
"""At most one may be set."""

NATS_SETTINGS = ("creds_file", "nkey_file", "domain", "inbox_prefix")

NATS_SCHEMES = ("nats", "tls")

KEY_IN_URL = re.compile(r"[?&]ssl_keyfile=[^&]")
CERTIFICATE_IN_URL = re.compile(r"[?&]ssl_certfile=[^&]")
CREDENTIALS_IN_URL = re.compile(r"://[^/?#]*@|[?&](username|password)=")


@dataclass(frozen=True, slots=True)
class BrokerAccess:
    """The settings of `backplane` for the access to a broker. Empty: not set."""

    username: str = ""
    password: str = field(default="", repr=False)
    password_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    creds_file: str = ""
    nkey_file: str = ""
    domain: str = ""
    inbox_prefix: str = ""

    @property
    def given(self) -> Mapping[str, str]:
        """The settings that are not empty, by name."""
        return {name: value for name, value in asdict(self).items() if value}

    def read_password(self) -> str:
        """Return the password, from its file if there is one.

        Raises:
            UnusableSettingError: the file can't be used.
        """
        return self.read("password_file") if self.password_file else self.password

    def read(self, setting: str) -> str:
        """Return the content of the file that a setting names.

        Raises:
            UnusableSettingError: the file can't be used.
        """
        try:
            return read_secret(getattr(self, setting))
        except SecretFileError as error:
            raise UnusableSettingError(f"backplane.{setting}", str(error)) from None

    def tls_context(self, *, ca_path: str | None = None, key_password: str = "") -> ssl.SSLContext:
        """Return a context that verifies the broker. It takes up to 0.1 s: call it in a thread.

        Args:
            ca_path: a folder with further CAs, named by their hashes.
            key_password: the passphrase of the key's file.

        Raises:
            OSError: a file can't be used; `certificate_error` finds out which.
        """
        context = verifying_context(self.ca_file or None, ca_path)
        if self.cert_file:
            # Without a passphrase, OpenSSL asks for one on the terminal.
            context.load_cert_chain(self.cert_file, self.key_file or None, key_password)
        return context


ANONYMOUS = BrokerAccess()


def certificate_error(url: str, access: BrokerAccess, error: OSError) -> UnusableSettingError:
    """Return the error for certificates that can't be loaded. OpenSSL names no file.

    Args:
        url: of the broker, which may name the files, too.
        access: names the files.
        error: of OpenSSL; base class of SSLError.
    """
    files = {name: file for name in TLS_PARAMETERS if (file := getattr(access, name))}
    name = next(iter(files), "")
    reason = getattr(error, "reason", None) or error.strerror or str(error)
    problem = f"{' and '.join(files.values())}: {reason.replace('_', ' ').lower()}"
    for each, file in files.items():
        try:
            Path(file).open("rb").close()
        except OSError as unreadable:
            name, problem = each, f"{file}: {unreadable.strerror}"
            break
    if not name or f"{TLS_PARAMETERS[name]}=" in url:
        return unusable_url(url, problem)
    return UnusableSettingError(f"backplane.{name}", problem)


def check_access(url: str, access: BrokerAccess) -> None:
    """Check that the settings fit the broker of the URL and each other.

    Raises:
        UnusableSettingError: they do not.
    """
    if KEY_IN_URL.search(url) and not (CERTIFICATE_IN_URL.search(url) or access.cert_file):
        raise unusable_url(url, "ssl_keyfile needs ssl_certfile")
    for name in access.given:
        if problem := _mismatch(url, name) or _conflict(url, access, name):
            raise UnusableSettingError(f"backplane.{name}", problem)


def _mismatch(url: str, name: str) -> str:
    """Return why a setting does not fit the URL, or an empty string."""
    scheme = url.partition("://")[0].lower()
    is_nats = scheme in NATS_SCHEMES
    if scheme == "memory":
        return "remove it, or set backplane.url: memory:// is not a broker"
    if name in NATS_SETTINGS and not is_nats:
        return f"remove it: only NATS has it, and backplane.url is {scheme}://"
    if name not in TLS_PARAMETERS:
        return ""
    if not (scheme == "tls" or scheme.startswith(("rediss", "valkeys"))):
        return f"needs TLS: begin backplane.url with {'tls' if is_nats else 'rediss'}://"
    if f"{TLS_PARAMETERS[name]}=" in url:
        return f"remove it, or {TLS_PARAMETERS[name]} from backplane.url"
    return ""


def _conflict(url: str, access: BrokerAccess, name: str) -> str:
    """Return why a setting contradicts others, or an empty string."""
    given = access.given
    ways = [each for each in CREDENTIAL_SETTINGS if each in given]
    if (name == "username" or name in ways) and CREDENTIALS_IN_URL.search(url):
        return "remove user, password and token from backplane.url"
    if name in ways and len(ways) > 1:
        return f"remove it, or {' and '.join(f'backplane.{each}' for each in ways if each != name)}"
    if name == "username" and not access.password and not access.password_file:
        return "needs backplane.password or backplane.password_file, and nothing else"
    if name == "key_file" and not access.cert_file:
        return "needs backplane.cert_file"
    return ""
