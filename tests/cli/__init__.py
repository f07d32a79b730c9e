"""The command line, and the settings that it is given."""
