"""The cost of a merge before it is made: time, memory, size of the output."""
