"""Settings: their model, how they are loaded, how they are written. Knows no part of the relay."""
