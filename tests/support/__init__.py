"""Machinery of the tests: processes, clients, brokers, proxies, and plugins of pytest."""
