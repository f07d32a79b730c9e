"""Measure the relay beside other servers, on the same loads and the same two cores.

Nothing in `service` knows of it.
"""
