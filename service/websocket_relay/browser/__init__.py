"""Static files: the browser client, as an npm package. Knows no Python code."""
