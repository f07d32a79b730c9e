"""The command line, and the settings of the relay."""
