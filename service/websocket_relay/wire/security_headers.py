"""Say what browsers may do with the relay's answers: nothing but read them. Knows no connection."""

SECURITY_HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    ("X-Frame-Options", "DENY"),  # for browsers and scanners that do not know frame-ancestors
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
"""On every HTTP answer, refusals included; after OWASP's REST Security Cheat Sheet.

Strict-Transport-Security is not among them: it binds a whole host name for months, and whether all
that is served there speaks TLS is known where TLS ends, at the proxy.
"""
