"""Registries and options: what lets a method, a space or a calibration be one file."""
