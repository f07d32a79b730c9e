"""The load test: many clients in one process, their counters, and the report."""
