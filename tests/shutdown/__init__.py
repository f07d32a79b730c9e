"""How a relay ends: told to, by a signal, while its broker misbehaves."""
