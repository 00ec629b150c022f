"""A fine-tuned checkpoint less its base model, as an adapter."""
