"""Every consumer, with adapters of every kind: what it computes, beside PEFT, the bare base model, and `check`.

    python tests/consumers/run.py                      all consumers that are installed
    python tests/consumers/run.py vllm==0.32 --install    one, in an environment that is made for it

A consumer is right if its log-probabilities are PEFT's, within its own rounding, and far from the bare base model's.
It may also refuse, or compute something else: `pcb-peft check` must have said so from the files alone. The exit
status is 1 where it did not, and 77 where no consumer that was asked for could run.
"""

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

sys.path.extend(map(str, Path(__file__).parents[:2]))  # for those who import this file, too
from answers import answers_to
from environments import ENVIRONMENTS, HERE, Environment, Form
from zoo import PROMPTS, adapters, base_model

from pcb_peft import PcbPeftError, check, export

DISTINCT = 10  # so many limits from the bare base model is an effect
SKIPPED = 77
RANK = "--max-lora-rank "


@dataclasses.dataclass(frozen=True)
class Case:
    """An adapter in one form.

    Attributes:
        name: Of the adapter.
        form: As what it was written.
        directory: Where it lies.
        options: What the consumer is started with.
        expected: "right", "refuses" or "wrong", by `check`.
    """

    name: str
    form: Form
    directory: Path
    expected: str
    options: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a consumer did with a case.

    Attributes:
        found: "right", "refuses", "wrong" or "nothing": it computes what the bare base model does.
        error: Largest difference of log-probabilities to PEFT's.
        effect: The same, to the bare base model's.
        words: Its message, if it refuses.
    """

    found: str
    error: float = 0.0
    effect: float = 0.0
    words: str = ""


class Reference:
    """Log-probabilities of the next token by PEFT of this environment."""

    def __init__(self, base: Path, prompts: Sequence[Sequence[int]]) -> None:
        self.base, self.prompts = base, prompts
        self.known: dict[str, list[torch.Tensor]] = {}

    @torch.no_grad()
    def values(self, adapter: Path | None) -> list[torch.Tensor]:
        """Return the values with an adapter, or of the bare base model."""
        key = str(adapter)
        if key not in self.known:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                self.base, dtype=torch.float32
            ).eval()
            if adapter is not None:
                model = peft.PeftModel.from_pretrained(model, adapter).eval()
            given = (torch.tensor([tokens]) for tokens in self.prompts)
            self.known[key] = [model(ids).logits[0, -1].log_softmax(-1) for ids in given]
        return self.known[key]

    def outcome(self, answered: Mapping[str, Any], adapter: Path, limit: float) -> Outcome:
        """Return what an answer means."""
        if "refused" in answered:
            return Outcome("refuses", words=answered["refused"])
        found = answered["logprobs"]
        error = difference(found, self.values(adapter))
        effect = difference(found, self.values(None))
        if error <= limit and effect > DISTINCT * limit:
            return Outcome("right", error, effect)
        return Outcome("nothing" if effect <= limit else "wrong", error, effect)


def difference(found: Sequence[Mapping[str, float]], wanted: Sequence[torch.Tensor]) -> float:
    """Return the largest difference over the tokens that were answered."""
    pairs = zip(found, wanted, strict=True)
    return max(abs(float(b[int(token)]) - value) for a, b in pairs for token, value in a.items())


def cases(
    environment: Environment, saved: Mapping[str, Path], base: Path, folder: Path
) -> Iterable[Case]:
    """Yield the adapters in the forms that a consumer takes; what an export refuses is left out."""
    for form in environment.forms:
        for name, adapter in saved.items():
            if name not in (environment.adapters or saved):
                continue
            directory = adapter if form == "saved" else folder / form / name
            if form != "saved" and not directory.exists():
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        profile = "transformers" if form == "folded" else form
                        export(adapter, profile, directory, base_model=base, progress=False)
                except PcbPeftError:
                    continue
            yield from _checked(environment, name, form, directory)


def _checked(environment: Environment, name: str, form: Form, directory: Path) -> Iterable[Case]:
    if (
        environment.consumer == "ctranslate2"
    ):  # it takes whole models, and `check` has no rules for it
        yield Case(name, form, directory, "right")
        return
    (verdict,) = check(directory, environment.consumer).verdicts
    expected = "right" if verdict.right else "wrong" if verdict.loads else "refuses"
    ranks = [int(flag.removeprefix(RANK)) for flag in verdict.flags if flag.startswith(RANK)]
    if ranks and expected == "right":  # and without the flag it must be refused
        yield Case(f"{name}, default flags", form, directory, "refuses")
        yield Case(name, form, directory, expected, {"max_lora_rank": ranks[0]})
    else:
        yield Case(name, form, directory, expected)


def answers(
    environment: Environment,
    folder: Path,
    base: Path,
    directories: Sequence[Path],
    request: Mapping[str, Any],
) -> list[Mapping[str, Any]]:
    """Run a consumer's script; where it dies, that is its answer, and it starts again behind that directory."""
    found: list[Mapping[str, Any]] = []
    if not environment.apart:
        script = importlib.import_module(Path(environment.script).stem)
        given = {"base": str(base), "directories": [*map(str, directories)], **request}
        return list(answers_to(given, script.prepare))
    while len(found) < len(directories):
        rest = [str(one) for one in directories[len(found) :]]
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump({"base": str(base), "directories": rest, **request}, file)
            file.flush()
            done = subprocess.run(
                [environment.python(folder), HERE / environment.script, file.name],
                capture_output=True,
                text=True,
                env=environment.environ(),
                check=False,
            )
        found += [json.loads(line) for line in done.stdout.splitlines()]
        if len(found) < len(directories):
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            found.append({"refused": f"died with status {done.returncode}: {last}"})
            print(done.stderr[-3000:], file=sys.stderr)
    return found


def judged(
    environment: Environment, folder: Path, reference: Reference, saved: Mapping[str, Path]
) -> list[tuple[Case, Outcome]]:
    """Return all cases of a consumer with their outcomes."""
    base = reference.base
    all_cases = list(cases(environment, saved, base, base.with_name("exports")))
    groups: dict[str, list[Case]] = {}
    for case in all_cases:
        groups.setdefault(json.dumps(case.options), []).append(case)
    found: list[tuple[Case, Outcome]] = []
    for options, group in groups.items():
        request = {"prompts": reference.prompts, "options": json.loads(options)}
        directories = [case.directory for case in group]
        for case, one in zip(
            group, answers(environment, folder, base, directories, request), strict=True
        ):
            adapter = saved[case.name.partition(",")[0]]
            found.append((case, reference.outcome(one, adapter, environment.limit)))
    return found


def agrees(case: Case, outcome: Outcome) -> bool:
    """Return whether a consumer did what `check` says."""
    return outcome.found == case.expected or (case.expected, outcome.found) == ("wrong", "nothing")


def line(case: Case, outcome: Outcome) -> str:
    """Return one line of the table."""
    mark = " " if agrees(case, outcome) else "✗"
    numbers = f"{outcome.error:10.2g}{outcome.effect:10.2g}" if not outcome.words else ""
    return (
        f"{mark} {case.form:9}{case.name:26}check: {case.expected:9}found: {outcome.found:9}"
        f"{numbers}{outcome.words[:150]}"
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run the consumers that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="CONSUMER", help="default: all")
    parser.add_argument(
        "--install", action="store_true", help="make environments that are not there"
    )
    parser.add_argument("--adapters", nargs="+", metavar="NAME", help="these alone")
    default = os.environ.get("PCB_PEFT_CONSUMERS") or HERE.parents[1] / ".venv-consumers"
    parser.add_argument(
        "--folder",
        type=Path,
        default=default,
        help="where environments are (default: $PCB_PEFT_CONSUMERS, or .venv-consumers)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    parsed = parser.parse_args(words)
    folder: Path = parsed.folder.absolute()
    chosen = [one for one in ENVIRONMENTS if not parsed.names or one.name in parsed.names]
    ready, results = list[Environment](), dict[str, Any]()
    for environment in chosen:
        if parsed.install:
            _install(environment, folder)
        if reason := environment.lacks(folder):
            print(f"{environment.name}: SKIPPED, {reason}")
            results[environment.name] = reason
        else:
            ready.append(environment)
    with tempfile.TemporaryDirectory() as work:
        results |= tables(ready, folder, Path(work), parsed.adapters)
    if parsed.json:
        parsed.json.write_text(json.dumps(results, indent=2))
    failed = any("✗" in line for one in ready for line in results[one.name])
    return int(failed) if ready else SKIPPED


def tables(
    environments: Sequence[Environment], folder: Path, work: Path, names: Sequence[str] | None
) -> dict[str, list[str]]:
    """Make the model and the adapters in a directory, and return the lines of each consumer's table."""
    transformers.utils.logging.disable_progress_bar()
    base = base_model(work / "base")
    saved = adapters(base, work / "adapters", names)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(base)
    reference = Reference(base, [tokenizer(prompt).input_ids for prompt in PROMPTS])
    found: dict[str, list[str]] = {}
    for environment in environments:
        print(
            f"{environment.name}: differences to PEFT (at most {environment.limit}) and to the base"
        )
        results = judged(environment, folder, reference, saved)
        found[environment.name] = [line(case, outcome) for case, outcome in results]
        print("\n".join(found[environment.name]), flush=True)
    return found


def _install(environment: Environment, folder: Path) -> None:
    try:
        environment.install(folder)
    except subprocess.CalledProcessError as error:
        print(f"{environment.name}: not installable here ({error})")


if __name__ == "__main__":
    sys.exit(main())
