"""The command line: the relay itself, and commands that connect to one as any client does."""
