"""A look at adapters from their files alone: one by one, and side by side before a merge."""
