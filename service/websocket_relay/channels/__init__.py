"""Own channels: members, fan-out, history, recovery. Knows no FastAPI and no broker's library."""
