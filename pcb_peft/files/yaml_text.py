"""YAML from strangers: plain values, bounded in size and depth, no key twice; 1e-3 is a number, as in YAML 1.2."""

import re
from typing import Any

import yaml

from pcb_peft.runtime.shown import quoted

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.1 wants a dot and a sign
_MOST_VALUES, _MOST_LEVELS = 100_000, 50


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses deep nesting, and a key that is there twice instead of taking the last."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > _MOST_LEVELS:
            raise yaml.YAMLError(f"it is nested too deeply: it may have {_MOST_LEVELS} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {quoted(key.value)} is there twice; give it once",
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
        yaml.YAMLError: It is not YAML, a key is there twice, it is nested too deeply, or its aliases stand for more
            than 100,000 values.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded(node, {})
        return loader.construct_document(node)  # pyright: ignore[reportUnknownVariableType]
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except (ValueError, OverflowError, TypeError) as error:  # a date, or a number, that is none
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _expanded(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return the number of values that a node stands for once its aliases are written out.

    Raises:
        yaml.YAMLError: They are too many, or a node holds itself.
    """
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = _MOST_VALUES  # until it is known: a node that holds itself is too large
    parts: list[Any] = [] if isinstance(node, yaml.ScalarNode) else node.value
    inner = [part for item in parts for part in (item if isinstance(item, tuple) else (item,))]
    size = 1 + sum(_expanded(part, sizes) for part in inner)
    if size > _MOST_VALUES:
        raise yaml.MarkedYAMLError(
            problem=f"its aliases stand for more than {_MOST_VALUES:,} values; write them out",
            problem_mark=node.start_mark,
        )
    sizes[id(node)] = size
    return size


def dump_yaml(content: dict[str, Any]) -> str:
    """Write YAML that `load_yaml` reads back, keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
