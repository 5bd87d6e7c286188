"""Hugging Face checkpoints: configurations, tensor files, tokenizers, adapters."""
