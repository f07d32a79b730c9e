"""What runs in browsers: relay.js, the console, EventSource."""
