"""Programs that load adapters and models: what each of them reads, refuses and ignores."""
