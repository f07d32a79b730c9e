"""The command `verify`: prove that a relay loses, doubles and reorders no message."""
