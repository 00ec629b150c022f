"""A device, and memory: what is taken, and what is refused before anything is computed."""

import peft
import pytest
import torch

from pcb_peft import OptionError, merge_adapters
from pcb_peft.runtime.resources import number_of_bytes, working_device

BYTES = {0: 0, 4096: 4096, "7": 7, "1K": 1024, "1.5M": 3 << 19, "2gib": 2 << 30, " 3 GB": 3 << 30}


@pytest.mark.parametrize(("given", "count"), BYTES.items())
def test_a_number_of_bytes(given: int | str, count: int):
    assert number_of_bytes(given) == count


@pytest.mark.parametrize("given", ["", "much", "1X", "G", "1KG", "inf", "nan", None, -1, "-1G"])
def test_what_is_no_number_of_bytes_is_named(given: object):
    with pytest.raises(OptionError, match=f"^max_memory is {given!r}; it must be "):
        number_of_bytes(given)  # type: ignore[arg-type]


def test_a_device_that_works():
    assert working_device(None) == working_device("cpu") == torch.device("cpu")
    assert working_device(torch.device("cpu")).type == "cpu"


@pytest.mark.parametrize("given", ["cudda", "cuda:99", "meta", 99, 1.5])
def test_a_device_that_does_not_work_here_is_named_with_those_that_do(given: object):
    with pytest.raises(OptionError, match=f"^device is {given!r}, .*; devices that do: cpu"):
        working_device(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"device": "cudda"}, {"max_memory": "1X"}])
def test_a_merge_refuses_them(given: dict[str, str], workshop):
    (name,) = given
    with pytest.raises(OptionError, match=f"^{name} is "):
        merge_adapters(
            [workshop.adapter("bert", peft.LoraConfig(target_modules=["query"]))], **given
        )
