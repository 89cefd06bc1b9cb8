"""The `openai` engine: rollouts from a completions server."""
