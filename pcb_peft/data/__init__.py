"""Texts, and statistics of an adapter's task collected from them."""
