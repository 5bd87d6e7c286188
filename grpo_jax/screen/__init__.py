"""What a command shows while it works, and what it says when it is interrupted. Nothing here loads JAX."""
