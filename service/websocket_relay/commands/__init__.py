"""What is typed in a terminal to use a relay: listen, send, bench. Clients, like any other."""
