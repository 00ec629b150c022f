"""Exports: an adapter written for one program, or a refusal that names what the program cannot hold."""
