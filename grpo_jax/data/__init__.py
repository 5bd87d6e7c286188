"""Prompts: files, data sets and tasks, and their order as a function of (seed, step)."""
