"""Single components, tested in the process of the tests."""
