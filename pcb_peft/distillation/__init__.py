"""A little training after a merge: its own texts, without labels, and its adapters as teachers."""
