"""A merge as one page for a browser."""
