"""Define the security headers of all HTTP responses. Knows no connection and no route."""

SECURITY_HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    ("X-Frame-Options", "DENY"),  # for browsers and scanners that do not support frame-ancestors
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
"""Sent with every HTTP response, refusals included. Follows OWASP's REST Security Cheat Sheet.

Browsers may read a response and do nothing else with it. Strict-Transport-Security is left out: it
binds a whole host name for months, and only the proxy that terminates TLS knows whether everything
served under that name uses TLS.
"""
