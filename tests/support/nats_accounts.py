"""Make an operator, an account and a user of NATS: their nkeys, and the JWTs that they sign.

What `nsc` does. Format: https://docs.nats.io/running-a-nats-service/configuration/securing_nats/auth_intro/jwt.
Knows no server and no relay.
"""

import json
from base64 import b32encode, urlsafe_b64encode
from binascii import crc_hqx
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

OPERATOR, ACCOUNT, USER = 14 << 3, 0, 20 << 3
"""The kinds of keys: the first bytes of their public keys, which begin with O, A and U."""

SEED = 18 << 3

NO_LIMITS = {
    **dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1),
    "wildcards": True,
}
JETSTREAM = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)


class Nkey:
    """A key pair of NATS.

    Args:
        kind: of its owner.
    """

    def __init__(self, kind: int) -> None:
        self._key = Ed25519PrivateKey.generate()
        self._kind = kind

    @property
    def public(self) -> str:
        return _encoded(bytes([self._kind]) + self._key.public_key().public_bytes_raw())

    @property
    def seed(self) -> str:
        prefix = bytes([SEED | self._kind >> 5, (self._kind & 31) << 3])
        return _encoded(prefix + self._key.private_bytes_raw())

    def jwt(self, subject: "Nkey", kind: str, **claims: Any) -> str:
        """Sign a JWT for the owner of another key, or for this one."""
        of_nats = {**claims, "type": kind, "version": 2}
        body = {"iss": self.public, "sub": subject.public, "name": kind, "nats": of_nats}
        signed = f"{_part({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{_part(body)}"
        return f"{signed}.{_base64(self._key.sign(signed.encode()))}"


class NatsAccounts:
    """An operator with a system account, and an account with one user.

    Args:
        subscribe: the subjects that the user may subscribe to.
    """

    def __init__(self, subscribe: Sequence[str]) -> None:
        operator, system, account, user = map(Nkey, (OPERATOR, ACCOUNT, ACCOUNT, USER))
        accounts = {
            system.public: operator.jwt(system, "account", limits=NO_LIMITS),
            account.public: operator.jwt(account, "account", limits=NO_LIMITS | JETSTREAM),
        }
        self.settings: Mapping[str, Any] = {
            "operator": operator.jwt(operator, "operator"),
            "system_account": system.public,
            "resolver": "MEMORY",
            "resolver_preload": accounts,
        }
        jwt = account.jwt(user, "user", sub={"allow": subscribe}, subs=-1, data=-1, payload=-1)
        self.credentials = (
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
        )
        """The content of the user's .creds file."""


def _encoded(raw: bytes) -> str:
    return b32encode(raw + crc_hqx(raw, 0).to_bytes(2, "little")).decode().rstrip("=")


def _part(content: Mapping[str, Any]) -> str:
    return _base64(json.dumps(content).encode())


def _base64(raw: bytes) -> str:
    return urlsafe_b64encode(raw).decode().rstrip("=")
