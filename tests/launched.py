"""What the processes of `test_processes` run: merges, by the words in a file, each into a directory of its own."""

import functools
import json
import os
import sys
from pathlib import Path

from pcb_peft import all_processes, merge_adapters, merge_method
from pcb_peft.merging import engine
from pcb_peft.runtime.processes import current
from pcb_peft.tasks.limits import Limits

RANK = int(os.environ["RANK"])


def fail(how):
    """Registers a method that, once the statistics are taken, does what `how` has for this process, with all `pids`."""

    @merge_method("failing", paper="none", space="dense", scope="global")
    def failing(tasks):
        """Fail."""
        tasks.order_statistics(abs, [0])
        pids = current().all_gather(os.getpid())
        exec(how.get(str(RANK), ""), {"pids": pids})
        tasks.extremes(abs)
        return tasks.combine(lambda x, weights: (weights * x).sum(0))


def small():
    """Statistics as of a large model: tiles, samples, and more values in a bracket than are kept."""
    limits = Limits(
        tile_values=1 << 8, sample_values=1 << 7, bracket_values=1 << 7, cached_values=0
    )
    engine.merge = functools.partial(engine.merge, limits=limits)


def main(file):
    words = json.loads(Path(file).read_text())
    small()
    with all_processes():
        for output, case in words["cases"].items():
            case, fold = dict(case), None
            if "fail" in case:
                fail(case.pop("fail"))
            if "fold" in case:
                fold = case.pop("fold")
            merged = merge_adapters(words["adapters"], **case)
            if fold:
                merged.fold(fold, Path(words["output"], output))
            else:
                merged.save_pretrained(
                    Path(words["output"], output), rank_pattern=str(case.get("rank"))[0] == "b"
                )


if __name__ == "__main__":
    main(sys.argv[1])
