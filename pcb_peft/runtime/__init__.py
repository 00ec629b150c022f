"""Processes, threads, devices and memory of a run, and how it shows its progress."""
