"""What the replicas of a relay tell each other: through the log, and in no other way."""
