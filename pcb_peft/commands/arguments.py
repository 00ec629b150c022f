"""What the words of a command line stand for."""

import argparse
import contextlib
from collections.abc import Generator
from typing import Any

import torch
import yaml

from pcb_peft.deltas.rank import Rank
from pcb_peft.errors import OptionError
from pcb_peft.plugins.options import Option
from pcb_peft.runtime.resources import number_of_bytes, working_device


def parse_bool(text: str) -> bool:
    """True or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def parse_rank(text: str) -> Rank:
    """An integer, a fraction, or a word."""
    if text == "none":
        return None
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text


def parse_step(text: str) -> dict[str, dict[str, Any]]:
    """``exponent:power=0.5`` is {"exponent": {"power": 0.5}}; several options are separated by commas."""
    name, _, options = text.partition(":")
    pairs = (option.partition("=") for option in options.split(",") if option)
    try:
        return {name: {option: yaml.safe_load(value) for option, _, value in pairs}}
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:OPTION=VALUE") from error


def parse_bytes(text: str) -> int:
    """1G, 512M, 64K or a number."""
    with _refused():
        return number_of_bytes(text)


def parse_device(text: str) -> torch.device:
    """A device that can be computed on here."""
    with _refused():
        return working_device(text)


@contextlib.contextmanager
def _refused() -> Generator[None]:
    """As the command line refuses a word."""
    try:
        yield
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def flag_of(option: Option) -> str:
    """The word for an option."""
    return "--" + option.name.replace("_", "-")
