"""What somebody may type who was asked for a relay's address, and is none."""

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
