"""What a run may use: processes, threads, a device, memory; and how it shows its progress."""
