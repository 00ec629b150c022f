"""Task vectors of a scope: blocks, exact order statistics, counter-based random numbers, compiled tiles."""
