"""The load test: clients in one process, what they measure, how it is shown."""
