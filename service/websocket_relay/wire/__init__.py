"""RFC 6455 and nothing above it: knows no channel and no settings file."""
