"""The stop of a relay: by signals, in time, also while its broker is faulty."""
