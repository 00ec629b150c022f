"""Atomic outputs: directories, shards, folded checkpoints, model cards."""
