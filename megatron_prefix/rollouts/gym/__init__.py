"""Tasks of the reasoning-gym library as prompts, and its scorers as a reward."""
