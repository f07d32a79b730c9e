"""Static files: the console and the browser client. Knows no Python code."""
