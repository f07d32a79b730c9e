"""Metrics, the log, traces, alerts and the dashboard."""
