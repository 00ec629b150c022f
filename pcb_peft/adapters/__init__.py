"""Adapters: where they come from, what they hold, how they are read and saved."""
