"""What goes over the wire: RFC 6455, RFC 7692, TLS, and clients that keep to none of it."""
