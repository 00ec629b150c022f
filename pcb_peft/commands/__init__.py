"""The command line: one file per command.

A command is a file here that ends with a `Command`, and its name in `cli.COMMANDS`. Its top level imports nothing that
imports torch, so that ``--help`` is fast; what `run` needs is imported in `run`.
"""
