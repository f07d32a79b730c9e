"""Verify servers by the same rules on all versions of Python. Knows no connection."""

import ssl
from pathlib import Path


def verifying_context(
    ca_file: str | Path | None = None, ca_path: str | None = None
) -> ssl.SSLContext:
    """Return a context that verifies servers.

    Args:
        ca_file, ca_path: a file and a folder with the authorities; neither: the system's, or those
            of the variable SSL_CERT_FILE.

    Raises:
        OSError: the file can't be used.
    """
    return accept_home_made_cas(ssl.create_default_context(cafile=ca_file, capath=ca_path))


def accept_home_made_cas(context: ssl.SSLContext) -> ssl.SSLContext:
    """Accept a CA without keyUsage and key identifiers, which home-made ones often lack.

    Python 3.13 rejects them by default; earlier versions, OpenSSL, curl and browsers do not. The
    chain, the dates and the host name are verified all the same.
    """
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context
