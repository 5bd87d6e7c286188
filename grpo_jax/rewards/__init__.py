"""Reward functions: loading them, calling them, and those that come with the package."""
