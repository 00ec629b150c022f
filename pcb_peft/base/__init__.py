"""A base checkpoint: its files, its architecture, its tensors."""
