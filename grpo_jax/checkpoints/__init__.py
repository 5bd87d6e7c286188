"""Durable states of a run."""
