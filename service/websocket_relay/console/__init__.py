"""Static files: the console. Knows no Python code."""
