"""The policy as a Hugging Face model: folders of its weights, and the `hf` engine."""
