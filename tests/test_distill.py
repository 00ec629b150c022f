"""Distillation on tiny models: what the teachers say, what the student learns, and that a run repeats."""

import dataclasses
import json
from pathlib import Path

import peft
import pytest
import torch
from torch.nn import functional

from pcb_peft import OptionError, distill_merge, load_adapter, merge_adapters
from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.commands.cli import main
from pcb_peft.data.live_adapters import with_adapter
from pcb_peft.data.models import load_base
from pcb_peft.distillation.base import call, head_of
from pcb_peft.distillation.student import Student
from pcb_peft.distillation.targets import Distribution, distribution
from pcb_peft.distillation.teacher import Reader
from pcb_peft.distillation.texts import encoded
from pcb_peft.errors import MismatchError, UnsupportedError

pytestmark = pytest.mark.slow  # whole models: the parts are tested by themselves


WORDS = [f"w{number}" for number in range(30)]
OPTIONS = {"steps": 20, "batch_texts": 4, "progress": False}


@pytest.fixture(scope="module")
def words():
    """A tokenizer of thirty words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(
        models.WordLevel(
            {"[PAD]": 0, "[UNK]": 1} | {w: 2 + i for i, w in enumerate(WORDS)}, "[UNK]"
        )
    )
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="[PAD]",
        eos_token="[PAD]",
        model_input_names=["input_ids", "attention_mask"],
    )


def texts(seed: int, count: int = 16) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 8, (count,), generator=generator).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(0, 30, (length,), generator=generator).tolist())
        for length in lengths
    ]


def lora(task_type: str | None, targets: list[str], **options) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=targets, task_type=task_type, **options
    )


@dataclasses.dataclass
class Case:
    kind: str
    config: peft.PeftConfig


CASES = {
    "classifier": Case("bert", lora("SEQ_CLS", ["query", "dense"], exclude_modules=".*pooler.*")),
    "language model": Case("llama", lora("CAUSAL_LM", ["q_proj", "down_proj"])),
    "no task type": Case("llama", lora(None, ["q_proj", "down_proj"])),
    "Conv1D": Case("gpt2", lora("CAUSAL_LM", ["c_attn", "c_proj"], fan_in_fan_out=True)),
    "(IA)³": Case(
        "bert",
        peft.IA3Config(
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
            exclude_modules=".*pooler.*|.*attention.output.*",
            task_type="SEQ_CLS",
        ),
    ),
}


def made(workshop, name: str) -> tuple[list[Path], Path]:
    case = CASES[name]
    return workshop.adapters(case.kind, [case.config, case.config]), workshop.base(case.kind)


def divergence(adapter, teacher, base: Path, some: list[dict[str, torch.Tensor]]) -> float:
    """Mean KL between two adapters with the teacher's head, by folding each into the model, text by text."""
    model = load_base(base, teacher.task_type)
    head, answers = head_of(teacher, model), []
    for one in (teacher, adapter):
        with torch.no_grad(), with_adapter(model, one):
            answers.append([call(model, head, text).logits.log_softmax(-1) for text in some])
    pairs = zip(*answers, strict=True)
    return float(
        torch.stack([(own.exp() * (own - other)).sum(-1).mean() for own, other in pairs]).mean()
    )


@pytest.mark.parametrize(
    "name",
    [
        name if name == "language model" else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ],
)
def test_a_merge_learns_what_its_adapters_say(name: str, workshop, words):
    paths, base = made(workshop, name)
    merged = merge_adapters(paths, "linear", weights=[0.3, 0.3], base_model=base)
    rows = [texts(1), texts(2)]
    better = distill_merge(merged, paths, rows, base, tokenizer=words, new_tokens=0, **OPTIONS)
    for path, some in zip(paths, rows, strict=True):
        encoded = [dict(words(text, return_tensors="pt")) for text in some]
        teacher = load_adapter(path, base_model=base)
        before, after = (divergence(one, teacher, base, encoded) for one in (merged, better))
        assert after < 0.9 * before
    assert better.history[0].keys() == {one.name for one in map(load_adapter, paths)}
    assert better.best_step > 0


@pytest.mark.parametrize("name", ["classifier", "language model", "Conv1D", "(IA)³"])
def test_the_student_is_the_merge_before_it_learns(name: str, workshop, words):
    paths, base = made(workshop, name)
    merged = merge_adapters(paths, "linear", weights=[0.5, 0.5], base_model=base)
    model = load_base(base, merged.task_type)
    batch = dict(words(texts(3)[0], return_tensors="pt"))
    with torch.no_grad(), with_adapter(model, merged):
        wanted = model(**batch).logits
    with torch.no_grad(), Student(merged, model).attached(model):
        torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-5, rtol=1e-5)


def test_only_lora_b_changes_and_the_rank_stays(workshop, words):
    paths, base = made(workshop, "classifier")
    merged = merge_adapters(paths, "flat", rank=2)
    better = distill_merge(merged, paths, [texts(1), texts(2)], base, tokenizer=words, **OPTIONS)
    for module in merged.modules:
        before, after = merged.modules[module], better.modules[module]
        assert after.rank <= 2
        q = torch.linalg.qr(before.lora_A.double().T).Q
        rows = after.lora_A.double()
        torch.testing.assert_close(rows @ q @ q.T, rows, atol=1e-6, rtol=0)
        assert not torch.equal(before.matrix(), after.matrix())


def test_a_run_repeats_to_the_byte_and_loads_in_peft(workshop, words, tmp_path: Path):
    paths, base = made(workshop, "classifier")
    merged = merge_adapters(paths, "flat", rank=2)
    for name in ("a", "b"):
        better = distill_merge(
            merged, paths, [texts(1), texts(2)], base, tokenizer=words, **OPTIONS
        )
        better.save_pretrained(tmp_path / name)
    file = "adapter_model.safetensors"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    recipe = (tmp_path / "a" / "distill_recipe.yaml").read_text("utf-8")
    assert "texts_sha256" in recipe
    loaded = peft.PeftModel.from_pretrained(workshop.model("bert"), tmp_path / "a")
    assert any("lora_B" in key for key in loaded.state_dict())


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(workshop, words, tmp_path: Path):
    paths, base = made(workshop, "classifier")
    merged = merge_adapters(paths, "flat", rank=2)
    arguments = (merged, paths, [texts(1), texts(2)], base)
    whole = distill_merge(*arguments, tokenizer=words, **OPTIONS)

    from pcb_peft.distillation import training

    file = tmp_path / "state.pt"
    update, calls = training.Training._update, []

    def interrupted(self, *given):
        calls.append(given)
        if len(calls) > 10:
            raise KeyboardInterrupt
        update(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Training, "_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distill_merge(*arguments, tokenizer=words, checkpoint=file, **OPTIONS)
    again = distill_merge(*arguments, tokenizer=words, checkpoint=file, **OPTIONS)
    assert again.history == whole.history
    for module in whole.modules:
        assert torch.equal(again.modules[module].matrix(), whole.modules[module].matrix())
    with pytest.raises(OptionError, match="belongs to another distillation"):
        distill_merge(*arguments, tokenizer=words, checkpoint=file, seed=1, **OPTIONS)


def test_a_language_model_is_taught_on_its_own_continuations(workshop, words):
    paths, base = made(workshop, "language model")
    merged = merge_adapters(paths, "linear", weights=[0.3, 0.3])
    rows = [texts(1), [{"prompt": text, "answer": "ignored"} for text in texts(2)]]
    better = distill_merge(merged, paths, rows, base, tokenizer=words, new_tokens=4, **OPTIONS)
    first, last = better.history[0], better.history[better.best_step]
    assert sum(last.values()) < 0.9 * sum(first.values())


def test_texts_are_continued_together_as_each_alone(workshop, words):
    paths, base = made(workshop, "language model")
    adapter, model = load_adapter(paths[0]), load_base(base, "CAUSAL_LM")
    given = encoded([{"text": text} for text in texts(3, 6)], words, 64)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), with_adapter(model, adapter):
        ends = [int(model.generate(**given[0], **options)[0, -3])]
        model.generation_config.eos_token_id = ends
        alone = [model.generate(**text, **options) for text in given]
    found = Reader("CAUSAL_LM", 0, 5).examples(model, adapter, {}, given)
    assert {
        row.shape[1] - text["input_ids"].shape[1] for row, text in zip(alone, given, strict=True)
    } > {5}
    for example, row, text in zip(found, alone, given, strict=True):
        assert torch.equal(example.inputs["input_ids"], row[:, :-1])
        assert example.start == text["input_ids"].shape[1] - 1
        with torch.no_grad(), with_adapter(model, adapter):
            logits = model(row[:, :-1]).logits[0, example.start :]
        wanted = logits.log_softmax(-1)
        torch.testing.assert_close(example.target.log_probabilities, wanted, atol=1e-4, rtol=1e-4)


def test_a_large_vocabulary_is_kept_in_part():
    logits = 3 * torch.randn(5, 1000)
    some, every = distribution(logits, kept=64), Distribution(logits.log_softmax(-1))
    other = logits + 0.3 * torch.randn(5, 1000)
    assert some.log_probabilities.shape == (5, 65)
    assert float(some.divergence(logits)) == pytest.approx(0, abs=1e-5)
    assert 0 < float(some.divergence(other)) <= float(every.divergence(other)) + 1e-6
    kl = functional.kl_div(
        other.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert float(every.divergence(other)) == pytest.approx(float(kl), rel=1e-4)


def test_the_base_model_is_left_as_it_was(workshop, words):
    paths, base = made(workshop, "classifier")
    model = load_base(base, "SEQ_CLS")
    before = {name: values.clone() for name, values in model.state_dict().items()}
    merged = merge_adapters(paths, "flat", rank=2)
    distill_merge(merged, paths, [texts(1), texts(2)], model, tokenizer=words, **OPTIONS)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


def test_mistakes_are_named(workshop, words):
    paths, base = made(workshop, "classifier")
    merged = merge_adapters(paths, "flat", rank=2)
    with pytest.raises(OptionError, match="2 adapters and texts for 1"):
        distill_merge(merged, paths, [texts(1)], base, tokenizer=words)
    with pytest.raises(OptionError, match="held_out is 1"):
        distill_merge(merged, paths, [texts(1), texts(2)], base, held_out=1, tokenizer=words)
    other = dataclasses.replace(load_adapter(paths[0]), task_type="CAUSAL_LM")
    with pytest.raises(MismatchError, match="CAUSAL_LM, SEQ_CLS"):
        distill_merge(merged, [paths[0], other], [texts(1), texts(2)], base, tokenizer=words)
    full = merge_adapters(paths, "linear", rank="full")
    with pytest.raises(UnsupportedError, match="integer rank"):
        distill_merge(full, paths, [texts(1), texts(2)], base, tokenizer=words)


def test_the_command_line(workshop, words, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths, base = made(workshop, "classifier")
    words.save_pretrained(base)
    files = [tmp_path / f"{number}.jsonl" for number in range(2)]
    for number, file in enumerate(files):
        rows = [{"text": text, "label": "ignored"} for text in texts(number)]
        file.write_text("\n".join(map(json.dumps, rows)))
    adapters = list(map(str, paths))
    merged, better = str(tmp_path / "merged"), str(tmp_path / "better")
    assert main(["merge", *adapters, "-o", merged, "--method", "flat", "--rank", "2"]) == 0
    given = ["--base-model", str(base), "--texts", *map(str, files), "--steps", "10"]
    assert main(["distill", merged, *adapters, *given, "-o", better]) == 0
    assert "divergence from each adapter" in capsys.readouterr().out
    assert load_adapter(better).modules.keys() == load_adapter(merged).modules.keys()
    assert list((tmp_path / "better" / "heads").iterdir())


@pytest.mark.slow
def test_two_processes_write_what_one_writes(workshop, words, launch, tmp_path: Path):
    """Each has the texts of one task; a gradient is the sum of both."""
    paths, base = made(workshop, "classifier")
    words.save_pretrained(base)
    merge_adapters(paths, "flat", rank=2).save_pretrained(tmp_path / "merged")
    files = [tmp_path / f"{number}.jsonl" for number in range(2)]
    for number, file in enumerate(files):
        file.write_text("\n".join(json.dumps({"text": text}) for text in texts(number)))
    given = ["--base-model", base, "--texts", *files, "--steps", "10"]
    command = ["-m", "pcb_peft", "distill", tmp_path / "merged", *paths, *given, "-o"]
    for count in (1, 2):
        codes, outputs, errors = launch(count, [*command, tmp_path / str(count)])
        assert codes == [0] * count, errors
        assert outputs[1:] == [""] * (count - 1)
    name = "adapter_model.safetensors"
    assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_module_that_the_merge_leaves_alone_stays_so(workshop, words):
    paths, base = made(workshop, "classifier")
    merged = merge_adapters(paths, "flat", rank=2)
    module = next(iter(merged.modules))
    zero = merged.modules[module].zero()
    entries = dict(merged.modules.entries)
    entries[module] = dataclasses.replace(entries[module], load=lambda: zero, rank=1)
    start = dataclasses.replace(merged, modules=DeltaMapping(entries))
    better = distill_merge(start, paths, [texts(1), texts(2)], base, tokenizer=words, **OPTIONS)
    assert better.modules[module].norm() == 0
    assert better.modules.keys() == merged.modules.keys()


@pytest.mark.slow
def test_a_base_model_in_bfloat16_is_taught_too(workshop, words):
    for name in ("classifier", "(IA)³"):
        paths, base = made(workshop, name)
        merged = merge_adapters(paths, "linear", weights=[0.3, 0.3], base_model=base)
        model = load_base(base, "SEQ_CLS").to(torch.bfloat16)
        better = distill_merge(
            merged, paths, [texts(1), texts(2)], model, tokenizer=words, **OPTIONS
        )
        first, last = better.history[0], better.history[better.best_step]
        assert sum(last.values()) < sum(first.values())


@pytest.mark.slow
def test_an_encoder_decoder_is_taught_on_its_own_answers(words, tmp_path: Path):
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=32, decoder_start_token_id=0, **sizes)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    paths = []
    for number in range(2):
        model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "base")
        model = peft.get_peft_model(model, lora("SEQ_2_SEQ_LM", ["q", "v", "wo"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        paths.append(tmp_path / f"adapter{number}")
        model.save_pretrained(paths[-1])
    merged = merge_adapters(paths, "linear", weights=[0.3, 0.3])
    rows = [texts(1), texts(2)]
    better = distill_merge(merged, paths, rows, tmp_path / "base", tokenizer=words, **OPTIONS)
    first, last = better.history[0], better.history[better.best_step]
    assert sum(last.values()) < 0.9 * sum(first.values())


def test_without_heads_the_hidden_states_are_the_lesson(words, tmp_path: Path):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=32, intermediate_size=24, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    paths = []
    for number in range(2):
        model = transformers.BertModel.from_pretrained(tmp_path / "base")
        options = peft.LoraConfig(
            r=2, target_modules=["value", "dense"], task_type="FEATURE_EXTRACTION"
        )
        model = peft.get_peft_model(model, options)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        paths.append(tmp_path / f"adapter{number}")
        model.save_pretrained(paths[-1])
    merged = merge_adapters(paths, "linear", weights=[0.3, 0.3])
    rows = [texts(1, 48), texts(2, 48)]
    better = distill_merge(merged, paths, rows, tmp_path / "base", tokenizer=words, **OPTIONS)
    first, last = better.history[0], better.history[better.best_step]
    assert sum(last.values()) < 0.9 * sum(first.values())
