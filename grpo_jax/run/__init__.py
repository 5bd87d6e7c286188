"""One run: its parts, its directory, its progress."""
