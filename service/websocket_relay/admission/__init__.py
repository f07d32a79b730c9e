"""Who may come in, and how much: origins, tokens, rights, limits. Knows no HTTP framework."""
