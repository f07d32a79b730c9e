"""The backend of a chat: the relay asks it who a client is, and reports to it what happens.

uvicorn --app-dir examples/chat --port 8000 backend:app
"""

import hashlib
import hmac
import json
import os
import secrets
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, Cookie, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse
from starlette.requests import cookie_parser

RELAY_URL = os.environ.get("RELAY_URL", "http://localhost:8443")
SECRET = Path("chat-secret.txt").read_text().strip().encode()
CHANNELS = ["chat.lobby", "typing.lobby"]
SIGNATURE_AGE_S = 300
SESSION_CHECK_S = 300
KEPT_EVENTS = 20

app = FastAPI()
users: dict[str, str] = {}  # by session; an application keeps them in its database
events: dict[str, dict[str, Any]] = {}  # webhooks by id, because one may arrive twice


def user_of(session: Annotated[str, Cookie()] = "") -> str:
    """Return the user who has logged in."""
    if session not in users:
        raise HTTPException(401)
    return users[session]


async def signed_json(request: Request) -> Any:
    """Return the body of a request that the relay has signed."""
    body = await request.body()
    signature = request.headers.get("Relay-Signature", "")
    fields = dict(part.partition("=")[::2] for part in signature.split(","))
    at = fields.get("t", "")
    if not at.isdecimal() or abs(time.time() - int(at)) > SIGNATURE_AGE_S:
        raise HTTPException(401)
    expected = hmac.new(SECRET, f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(expected.encode(), fields.get("v1", "").encode()):
        raise HTTPException(401)
    return json.loads(body)


User = Annotated[str, Depends(user_of)]
Signed = Annotated[Any, Depends(signed_json)]


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("index.html"))


@app.post("/login", status_code=204)
async def log_in(
    user: Annotated[str, Body(embed=True, pattern=r"^[\w-]{1,20}$")], response: Response
) -> None:
    """Begin a session. An application checks a password first."""
    session = secrets.token_urlsafe()
    users[session] = user
    response.set_cookie("session", session, httponly=True, samesite="lax")


@app.post("/logout", status_code=204)
async def log_out(session: Annotated[str, Cookie()] = "") -> None:
    users.pop(session, None)


@app.get("/me")
async def me(user: User) -> dict[str, str]:
    return {"user": user, "relay": RELAY_URL}


@app.post("/relay/session")
async def admit(question: Signed) -> dict[str, Any]:
    """Answer the relay who a client is, and which channels it may use (auth.hook.url)."""
    cookies = cookie_parser(question["headers"].get("cookie", ""))
    user = user_of(cookies.get("session", ""))
    permissions = {"subscribe": CHANNELS, "publish": CHANNELS}
    return {"user": user, **permissions, "expires_in_s": SESSION_CHECK_S}


@app.post("/webhooks", status_code=204)
async def receive(batch: Signed) -> None:
    """Keep what the relay reports of the channels with presence (hooks.url)."""
    events.update({event["id"]: event for event in batch["events"]})
    for old in list(events)[:-KEPT_EVENTS]:
        del events[old]


@app.get("/webhooks")
async def received(_: User) -> list[dict[str, Any]]:
    """Return the last webhooks, the newest first."""
    return list(reversed(events.values()))
