"""A fuzzer that knows the structure of what it breaks: files and command lines as strangers could give them.

    python -m tests.fuzz --surface adapters --seconds 120 --seed 0

Each surface (`surfaces.py` lists them) starts from examples that PEFT and transformers wrote, changes them a little,
and gives them to the package. All that may come of it is a result, or a PcbPeftError, within two seconds and a bound of
memory. A case is known by its surface, seed and number, and can be run again by itself.
"""
