"""The command line: the relay itself, and commands that use one as any client does."""
