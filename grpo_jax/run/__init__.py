"""One run: what it is made of, its directory, its progress."""
