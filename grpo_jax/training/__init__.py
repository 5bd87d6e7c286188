"""One update: from prompts to a judged rollout, from a rollout to an Experience, from it to a new state."""
