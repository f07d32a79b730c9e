"""One part at a time, in the process of the tests."""
