"""A merge, written down; overrides for some modules; names that PEFT gives to merges."""
