"""Merge adapters with several processes, on one machine or on several that share a file system.

    torchrun --nproc-per-node 4 examples/accelerate_merge.py OUTPUT ADAPTER ADAPTER [ADAPTER ...]
    accelerate launch --multi_gpu examples/accelerate_merge.py OUTPUT ADAPTER ADAPTER [ADAPTER ...]

Without GPUs use torchrun: accelerate starts several CPU processes only with mpirun.

The output is identical, to the byte, to that of one process (``python examples/accelerate_merge.py ...``).
The command line does the same: ``torchrun --nproc-per-node 4 -m pcb_peft merge ADAPTER ... -o OUTPUT``.
"""

import sys

from pcb_peft import all_processes, merge_adapters


def main() -> None:
    """Merge in dense space with global scope: the combination that takes longest."""
    output, *adapters = sys.argv[1:]
    with all_processes() as processes:
        merged = merge_adapters(adapters, method="pcb", space="dense", scope="global", rank=16)
        merged.save_pretrained(output)
        if processes.is_main:
            sys.stdout.write(f"{merged.report}\n")


if __name__ == "__main__":
    main()
