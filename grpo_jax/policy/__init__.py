"""The language model as pure functions: the decoder, sampling, decoding, log-probabilities, LoRA."""
