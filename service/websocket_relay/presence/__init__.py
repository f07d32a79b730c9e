"""Who is subscribed to a channel, on all replicas."""
