"""Record what the PCB authors' own code returns.

    python make_pcb_golden.py PATH_TO_CHECKOUT_OF_pcb-merging

Writes pcb.safetensors beside this file. The authors' scripts do not run as published (undefined
names, absent data), so their functions, and the main block of vision_source_code/pcb.py, are lifted
out of the checkout by syntax tree and executed. Nothing of them is copied here. The checkout must
hold the files of the commit below, unchanged.
"""

import ast
import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

REPOSITORY = "https://github.com/duguodong7/pcb-merging"
COMMIT = "5897888b5d24adfcd33e124793d113746e00f3ff"
BLOBS = {
    "pcb-merging.py": "7fe3e3724d4b769c575baec7f7ee4690ae9e3536",
    "nlp_source_code/merging.py": "df2f4b8b82a18774c9fecf9a45abad1ad851b62c",
    "nlp_source_code/utils/merge_utils.py": "2706810c0c31b149a25507607f7bcb5d4657b629",
    "vision_source_code/pcb.py": "4234fd68cfb060a08cfd8071b09d9f181f5901dd",
    "vision_source_code/pcb_ES.py": "d98842ba25635b4570e8c6e5f4afd19d6c132a1f",
}
KEYS = {
    "{case}.x": "task vectors, float32, shape (T, D)",
    "{case}.weights": "lambda per task, shape (T,)",
    "{case}.{formula}.float32": "merged task vector, shape (D,), from x as it is",
    "{case}.{formula}.float64": "the same code called with x in float64",
    "formula": "reference = pcb-merging.py PCB_merge, nlp = merge_utils.py task_para_att_merge, "
    "vision = main block of vision_source_code/pcb.py, es = vision_source_code/pcb_ES.py PCB; "
    "the weights enter through compute_acc of pcb_ES.py (reference, es), get_score of "
    "nlp_source_code/merging.py (nlp) and the block itself (vision)",
    "published_t8": "vision as published, with its own density .05 and its own eight lambda",
}
Merge = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Case:
    """One seeded input and the formulas run on it."""

    name: str
    make: Callable[[int, int, torch.Generator], Tensor]
    tasks: int
    size: int
    density: float
    weights: tuple[float, ...]
    formulas: tuple[str, ...] = ("reference", "nlp", "vision", "es")


class Merged(Exception):  # noqa: N818
    """Leaves a foreign function with the vector it is about to load into a model."""


def lora_like(tasks: int, size: int, generator: torch.Generator) -> Tensor:
    """Flattened rank-4 products with a shared part, standard deviation 5e-3."""
    rows = 20
    B = torch.randn(tasks + 1, rows, 4, generator=generator)
    A = torch.randn(tasks + 1, 4, size // rows, generator=generator)
    delta = (B @ A).flatten(1)
    x = delta[:-1] + 0.7 * delta[-1]
    return 5e-3 * x / x.std(dim=1, keepdim=True)


def ia3_like(tasks: int, size: int, generator: torch.Generator) -> Tensor:
    """Magnitudes uniform in [.1, 1], two entries of three with the sign the tasks share."""
    magnitude = 0.1 + 0.9 * torch.rand(tasks, size, generator=generator)
    shared = torch.rand(size, generator=generator) - 0.5
    own = torch.rand(tasks, size, generator=generator) - 1 / 3
    return magnitude * shared.sign() * own.sign()


# D q and mostly D (1 - density) are fractional: another rounding of an index is another result.
CASES = (
    Case("lora_t2_wide", lora_like, 2, 12020, 0.05, (1.0, 1.0), ("reference",)),
    Case("lora_t3", lora_like, 3, 2480, 0.1, (1.25, 0.75, -0.5)),
    Case("lora_t5", lora_like, 5, 1980, 0.2, (1.0, 1.5, 0.5, 1.25, 0.75)),
    Case("ia3_t2", ia3_like, 2, 2003, 0.2, (1.0, 1.0)),
    Case("ia3_t3", ia3_like, 3, 1999, 0.1, (0.5, 1.0, 2.0)),
    Case("ia3_t5", ia3_like, 5, 2011, 0.05, (1.0, 1.5, 0.5, 1.25, -0.75)),
    Case("published_t8", lora_like, 8, 1020, 0.05, (1.2,) * 8, ("vision_published",)),
)


def read(checkout: Path, path: str) -> ast.Module:
    """The syntax tree of one of the authors' files; refuses any other content than the commit's."""
    content = (checkout / path).read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if blob != BLOBS[path]:
        raise SystemExit(f"{path} has git blob {blob}; {COMMIT[:7]} has {BLOBS[path]}")
    return ast.parse(content)


def execute(statements: Iterable[ast.stmt], names: dict[str, Any]) -> dict[str, Any]:
    """Run statements with torch and the given names in scope; returns the scope."""
    scope = {"torch": torch, **names}
    exec(compile(ast.Module(list(statements), []), "pcb-merging", "exec"), scope)
    return scope


def functions(tree: ast.Module) -> list[ast.stmt]:
    """The top-level function definitions."""
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]


def vision_block(tree: ast.Module, preset: set[str]) -> list[ast.stmt]:
    """The main block up to the merged vector, without the assignments to names that are preset."""
    block = next(node for node in tree.body if isinstance(node, ast.If)).body
    ends = [ast.unparse(node).startswith("merged_tv =") for node in block].index(True) + 1
    return [node for node in block[:ends] if assigned(node) not in preset]


def assigned(node: ast.stmt) -> str | None:
    """The name a simple assignment binds."""
    return ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else None


def leave(merged: Tensor, *_: object, **__: object) -> None:
    """Stands in for `vector_to_state_dict`."""
    raise Merged(merged)


def weigh(
    function: Callable[..., object], values: Tensor, scale: Tensor, weights: Tensor
) -> Tensor:
    """The vector that the authors' evaluation function merges for these lambda."""
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    given = {"lams": weights.tolist(), "scale": scale, "flat_ptm": torch.zeros(values.shape[1])}
    given |= {"all_checks": values, "clamped_all_checks": values}
    try:
        function(**{name: given.get(name) for name in arguments})
    except Merged as leaving:
        return leaving.args[0]
    raise SystemExit(f"{function.__name__} did not merge")


def authors_code(checkout: Path) -> dict[str, Merge]:
    """The authors' code paths as functions of x, lambda and density."""
    hook = {"vector_to_state_dict": leave}
    root = execute(functions(read(checkout, "pcb-merging.py")), {})
    es = execute(functions(read(checkout, "vision_source_code/pcb_ES.py")), hook)
    nlp = execute(functions(read(checkout, "nlp_source_code/utils/merge_utils.py")), {})
    score = execute(functions(read(checkout, "nlp_source_code/merging.py")), hook)["get_score"]
    vision_tree = read(checkout, "vision_source_code/pcb.py")

    def with_own_mean(function: Callable[..., Any], evaluate: Callable[..., object]) -> Merge:
        def merge(x: Tensor, weights: Tensor, density: float) -> Tensor:
            merged, values, scale = function(x, density)
            weighed = weigh(evaluate, values, scale, weights)
            if bool((weights == 1).all()) and not torch.equal(merged, weighed):
                raise SystemExit("the returned and the weighed vector differ at lambda 1")
            return weighed

        return merge

    def vision(x: Tensor, weights: Tensor, density: float) -> Tensor:
        given = {"tv_flat_checks": x, "att_ratio": density, "lams": weights.unsqueeze(1)}
        statements = functions(vision_tree) + vision_block(vision_tree, {"att_ratio", "lams"})
        return execute(statements, given)["merged_tv"]

    def vision_published(x: Tensor, weights: Tensor, density: float) -> Tensor:
        statements = functions(vision_tree) + vision_block(vision_tree, set())
        scope = execute(statements, {"tv_flat_checks": x})
        if scope["att_ratio"] != density or not torch.equal(scope["lams"][:, 0], weights):
            raise SystemExit("the published density or lambda are not those of the case")
        return scope["merged_tv"]

    return {
        "reference": with_own_mean(root["PCB_merge"], es["compute_acc"]),
        "nlp": with_own_mean(nlp["task_para_att_merge"], score),
        "vision": vision,
        "vision_published": vision_published,
        "es": lambda x, weights, density: weigh(es["compute_acc"], *es["PCB"](x, density), weights),
    }


def record(code: dict[str, Merge]) -> dict[str, Tensor]:
    """Inputs and outputs of every case."""
    tensors: dict[str, Tensor] = {}
    for seed, case in enumerate(CASES):
        x = case.make(case.tasks, case.size, torch.Generator().manual_seed(seed))
        weights = torch.tensor(case.weights)
        tensors |= {f"{case.name}.x": x, f"{case.name}.weights": weights}
        for formula in case.formulas:
            for dtype in (torch.float32, torch.float64):
                merged = code[formula](x.to(dtype), weights, case.density)
                name = formula.removesuffix("_published")
                tensors[f"{case.name}.{name}.{str(dtype).removeprefix('torch.')}"] = merged
    return tensors


def main(checkout: Path) -> None:
    """Write the file, with one metadata key: several have no fixed order in it."""
    metadata = {
        "repository": REPOSITORY,
        "commit": COMMIT,
        "torch": torch.__version__,
        "keys": KEYS,
        "density": {case.name: case.density for case in CASES},
    }
    target = Path(__file__).with_name("pcb.safetensors")
    save_file(record(authors_code(checkout)), target, {"golden": json.dumps(metadata)})
    target.chmod(0o644)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
