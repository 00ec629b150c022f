"""YAML as recipes use it: plain values, no key twice, and 1e-3 is a number, as in YAML 1.2 and in Python."""

import re
from typing import Any

import yaml

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.1 wants a dot and a sign


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key that is there twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is there twice; give it once",
                    problem_mark=key.start_mark,
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes a text that the loader would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(f"(?:{_EXPONENT.pattern})$"), list("-+0123456789.")
    )


def load_yaml(text: str) -> Any:
    """Parse YAML.

    >>> load_yaml("ridge: 1e-3")
    {'ridge': 0.001}

    Raises:
        yaml.YAMLError: It is not YAML, or a key is there twice.
    """
    return yaml.load(text, _Loader)


def dump_yaml(content: dict[str, Any]) -> str:
    """Write YAML that `load_yaml` reads back, keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
