"""The wire protocol: RFC 6455, RFC 7692, TLS, and clients that violate them."""
