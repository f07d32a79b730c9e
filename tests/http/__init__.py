"""Plain requests: publishing, server-sent events, probes, the pages."""
