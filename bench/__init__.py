"""Measure the relay beside other servers, on the same loads and the same two cores.

No module of `service` imports it.
"""
