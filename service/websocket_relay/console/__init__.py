"""The console and the browser's client: files that are served as they are."""
