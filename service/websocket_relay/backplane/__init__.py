"""The replicated message log: one total order for all replicas. Knows no client."""
