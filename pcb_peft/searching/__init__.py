"""Searches for a better merge: weights, methods, spaces and their options, measured on validation texts."""
