"""Texts that a user may type as the URL of a relay, and that are no such URL."""

INVALID_URLS = (
    "",
    "localhost:8443/?access_token=secret",
    "http://localhost:8443/?access_token=secret",
    "ws:///channels/news?access_token=secret",
    "ws://localhost:99999/?access_token=secret",
    "ws://[::1/?access_token=secret",
    "ws://me:secret/is@localhost/",
    "ws://localhost/#secret",
)
