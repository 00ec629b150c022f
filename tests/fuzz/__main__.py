"""``python -m tests.fuzz``: run the fuzzer, from the root of the repository."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    from fuzz.runner import main

    sys.exit(main())
