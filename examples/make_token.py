"""Print a token for the given channels, which expires in one hour.

This is for trials: in production, a service of yours signs its users' tokens.
"""

import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import jwt

LIFETIME_S = 3600
EXAMPLE = """\
example (umask 077: no other user may read the files):
  umask 077
  python -c "import secrets; print(secrets.token_hex(32))" > secret.txt
  python examples/make_token.py secret.txt news "chat.*" > token.txt
"""


def make_token(secret: str, channels: Sequence[str]) -> str:
    permissions = {"subscribe": channels, "publish": channels}
    claims = {"exp": int(time.time()) + LIFETIME_S, "relay": permissions}
    return jwt.encode(claims, secret, algorithm="HS256")


def main(secret_file: Path, channels: Sequence[str]) -> int:
    try:
        token = make_token(secret_file.read_text(encoding="utf-8").strip(), channels)
    except OSError as error:
        problem = error.strerror
    except (UnicodeDecodeError, jwt.InvalidKeyError):
        problem = "not a secret: empty, not UTF-8 text, or a key of another type"
    else:
        print(token)
        return 0
    print(f"{secret_file}: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    parser = ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("secret_file", type=Path, help="file with the relay's auth.jwt.secret")
    parser.add_argument("channels", nargs="+", help="names; a trailing * matches any suffix")
    arguments = parser.parse_args()
    sys.exit(main(arguments.secret_file, arguments.channels))
