"""Print a token for the channels that are named, which ends in an hour.

python examples/make_token.py SECRET_FILE CHANNEL...

SECRET_FILE holds what the relay has as auth.jwt.secret. A * at a channel's end stands for any rest.
This is for trying it out: where there are users, a service of yours signs their tokens.
"""

import sys
import time
from pathlib import Path

import jwt

LIFETIME_S = 3600


def main(secret_file: str, *channels: str) -> None:
    secret = Path(secret_file).read_text().strip()
    rights = {"subscribe": channels, "publish": channels}
    claims = {"exp": int(time.time()) + LIFETIME_S, "relay": rights}
    print(jwt.encode(claims, secret, algorithm="HS256"))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python examples/make_token.py SECRET_FILE CHANNEL...")
    main(*sys.argv[1:])
