"""Measures how well an adapter, or a merge, does its tasks on held-out text."""
