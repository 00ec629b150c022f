"""What a merge would take: time, memory, size of the output."""
