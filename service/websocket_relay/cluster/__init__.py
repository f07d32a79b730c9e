"""What the replicas of a relay write for each other: through the log, and in no other way."""
