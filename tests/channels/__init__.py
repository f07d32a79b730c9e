"""What clients of a channel hear: order, history, and who is slow."""
