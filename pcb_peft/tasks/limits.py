"""Limits: how many values a merge looks at, computes and keeps at a time.

One frozen value is passed to everything that needs a limit, so that a test, or a small machine, can pass its own::

    TaskVectors(blocks, limits=dataclasses.replace(DEFAULT_LIMITS, tile_values=1 << 16))

Only `double_values` and the two limits of compiling change how results are rounded. All others change speed and memory
alone, never a byte of the result.
"""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one merge. All are numbers of values, except where another unit is given.

    Attributes:
        tile_values: Size of a tile, of all adapters together, on the CPU. In calls on smaller tiles, threads would
            spend their time waiting for the Python interpreter.
        device_tile_values: Size of a tile on an accelerator, which needs larger ones to be busy.
        cached_values: A scope of at most so many values, of all adapters together, keeps its tiles in memory between
            passes.
        sample_values: Values that are sampled per adapter before a pass; a scope that is not larger is read as a whole.
        large_sample_values: The same for scopes so large that brackets from a smaller sample would keep too much.
        all_samples_values: Values that are sampled of all adapters together.
        double_values: A scope of at most so many values, of all adapters together, is computed in float64.
        bracket_values: Values that one bracket keeps in a pass.
        all_brackets_values: Values that all brackets keep together: there may be thousands.
        bracket_margin: Half the width of a bracket, in standard errors of a quantile of as many independent values.
            Sampled values share rows and columns, so that they are not independent: hence as many as twelve.
        compile_values: Scopes of at least so many values, of all adapters together, are compiled; for smaller ones
            compiling takes longer than it saves.
        compile_adapters: Most adapters for which tiles are compiled: the compiler writes out every pair of them.
    """

    tile_values: int = 1 << 19
    device_tile_values: int = 1 << 24
    cached_values: int = 1 << 24
    sample_values: int = 1 << 18
    large_sample_values: int = 1 << 20
    all_samples_values: int = 1 << 26
    double_values: int = 1 << 27
    bracket_values: int = 1 << 24
    all_brackets_values: int = 1 << 28
    bracket_margin: float = 12.0
    compile_values: int = 3 << 30
    compile_adapters: int = 16

    def dtype(self, adapters: int, size: int) -> torch.dtype:
        """Return the dtype in which a scope is computed, given its adapters and its values per adapter."""
        return torch.float64 if adapters * size <= self.double_values else torch.float32

    def sample_size(self, adapters: int, size: int) -> int:
        """Return how many of an adapter's `size` values are sampled."""
        if size <= self.sample_values:
            sampled = size
        else:
            small = min(size >> 4, self.sample_values)
            sampled = max(small, min(size >> 10, self.large_sample_values))
        return min(sampled, self.all_samples_values // adapters)

    def cached_bytes(self, adapters: int, size: int, max_bytes: float) -> int:
        """Return the bytes of a scope's tiles and of one score per tile; 0 if they are not kept between passes.

        Args:
            adapters: Number of adapters.
            size: Values per adapter in the scope.
            max_bytes: Memory that they may take.
        """
        cached = 2 * self.dtype(adapters, size).itemsize * adapters * size
        return cached if adapters * size <= self.cached_values and cached <= max_bytes else 0

    def tile_size(self, device: torch.device, *, compiled: bool) -> int:
        """Return the values of a tile, of all adapters; compiled tiles need less scratch memory, so they are larger."""
        values = self.tile_values if device.type == "cpu" else self.device_tile_values
        return 2 * values if compiled else values

    def bracket_size(self, brackets: int) -> int:
        """Return how many values each of so many brackets may keep."""
        return min(self.bracket_values, self.all_brackets_values // brackets)

    def worth_compiling(self, adapters: int, size: int) -> bool:
        """Return whether a scope, of `size` values per adapter, takes longer than compiling for it."""
        return adapters <= self.compile_adapters and adapters * size >= self.compile_values


DEFAULT_LIMITS = Limits()
