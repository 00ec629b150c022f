"""What runs a quantised base model computes what it computes with the same values as plain numbers."""

import copy
import json

import peft
import pytest
import torch
import transformers
from helpers import lora
from models import save
from quantised_models import plain, quantised, two_forms
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from pcb_peft import (
    BaseModelError,
    collect_statistics,
    compare_adapters,
    distill_merge,
    evaluate,
    export,
    fold_adapter,
    inspect_adapter,
    load_merged,
    merge_adapters,
    read_recipe,
    search,
)
from pcb_peft.commands.cli import main
from pcb_peft.data.models import load_base

pytestmark = pytest.mark.slow  # whole models

TOKENS = torch.arange(12).reshape(2, 6)
WORDS = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
TEXTS = ["a b c d", "k l m", "x y z a b", "q r s t"]
QUIET = {"dequantize": True, "progress": False}
WAYS = r"is quantised.+made from.+dequantize=True|is quantised.+dequantize=True.+made from"


def with_tokenizer(directory):
    """A base model whose tokens are letters."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    return directory


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return with_tokenizer(quantised("nf4", tmp_path_factory.mktemp("nf4") / "base"))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return with_tokenizer(plain(tmp_path_factory.mktemp("plain") / "base", "nf4"))


@pytest.fixture(scope="module")
def halves(numbers, tmp_path_factory):
    """The same in bfloat16, which is the data type of a quantised model if none is asked for."""
    directory = with_tokenizer(tmp_path_factory.mktemp("half"))
    half = transformers.AutoModelForCausalLM.from_pretrained(numbers, dtype=torch.bfloat16)
    half.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapters(shared_workshop, numbers):
    """A LoRA and a DoRA, for which W is needed."""
    made = []
    for options in ({}, {"use_dora": True}):
        model = transformers.AutoModelForCausalLM.from_pretrained(numbers)
        config = lora("q_proj", "down_proj", task_type="CAUSAL_LM", **options)
        made.append(shared_workshop.adapter(model, config, f"adapter{len(made)}"))
    return made


@pytest.fixture(scope="module")
def merge(adapters, codes):
    return merge_adapters(adapters, "linear", [0.5, 0.5], base_model=codes, rank=6, **QUIET)


@pytest.mark.parametrize("scheme", ["nf4", "int8", "compressed", "fp8", "gptq", "awq"])
def test_a_quantised_model_in_memory(scheme, tmp_path):
    if scheme in ("nf4", "int8", "compressed"):
        base, values = quantised(scheme, tmp_path / "q"), plain(tmp_path / "d", scheme)
    else:
        base, values = two_forms(scheme, tmp_path / "m")
    wanted = logits(load_base(values, "CAUSAL_LM", torch.float32))
    found = load_base(base, "CAUSAL_LM", torch.float32, dequantize=True)
    torch.testing.assert_close(logits(found), wanted, rtol=1e-5, atol=1e-6)
    assert not hasattr(found.config, "quantization_config")


def test_a_model_of_another_class_and_its_configuration_of_generation(codes):
    transformers.GenerationConfig(max_new_tokens=7).save_pretrained(codes)
    model = load_base(codes, "SEQ_CLS", dequantize=True, num_labels=5)
    assert (model.score.out_features, model.dtype) == (5, torch.bfloat16)
    assert load_base(codes, "CAUSAL_LM", dequantize=True).generation_config.max_new_tokens == 7


def test_layers_of_gpt2_are_quantised_as_linear_layers(workshop, tmp_path):
    """bitsandbytes has (out, in) where Conv1D has (in, out); one of these layers is square."""
    model = workshop.model("gpt2")
    base = save(model, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith((".c_attn.weight", ".c_proj.weight"))]:
        rows = tensors.pop(name).T.contiguous()
        largest = rows.abs().amax(1)
        codes = (127 * rows / largest[:, None]).round().to(torch.int8)
        tensors |= {name: codes, name.replace(".weight", ".SCB"): largest}
        values = (codes * largest[:, None] / 127).T
        model.get_parameter(name).data = values.contiguous()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (base / "config.json").write_text(json.dumps(config))
    adapter = workshop.adapter(copy.deepcopy(model), lora("c_attn", "c_proj", fan_in_fan_out=True))
    found = load_base(base, "CAUSAL_LM", torch.float32, dequantize=True)
    torch.testing.assert_close(logits(found), logits(model.eval()), rtol=1e-5, atol=1e-6)
    fold_adapter(adapter, base, tmp_path / "folded", dequantize=True, progress=False)
    folded = load_base(tmp_path / "folded", "CAUSAL_LM", torch.float32)
    wanted = logits(peft.PeftModel.from_pretrained(model, adapter))
    assert torch.dist(logits(folded), wanted) < 0.05 * wanted.norm()  # bfloat16


def test_evaluation(merge, adapters, codes, numbers, tmp_path):
    merge.save_pretrained(tmp_path / "merged")
    data, options = [TEXTS, TEXTS], {"controls": True, "cache": False, "progress": False}
    found = evaluate(tmp_path / "merged", adapters, codes, data, dequantize=True, **options)
    wanted = evaluate(tmp_path / "merged", adapters, numbers, data, **options)
    again = evaluate(tmp_path / "merged", data=data, **options)  # as its recipe says
    assert again.tasks == found.tasks
    for one, other in zip(found.tasks, wanted.tasks, strict=True):
        for role in ("base", "adapter", "merged"):
            scores = (getattr(task, role).outcomes for task in (one, other))
            assert next(scores) == pytest.approx(next(scores), rel=1e-5)


def test_search(adapters, codes, numbers, tmp_path):
    options = {
        "vary": {},
        "optimiser": "random",
        "cache": False,
        "progress": False,
        "test_data": [TEXTS[:2]] * 2,
    }
    start = (adapters, [TEXTS[2:]] * 2)
    found = search(*start, base_model=codes, dequantize=True, **options)
    wanted = search(*start, base_model=numbers, **options)
    for one, other in zip(found.trials, wanted.trials, strict=True):
        assert one.kept.keys() == other.kept.keys()
        for scale in one.kept:
            assert one.kept[scale] == pytest.approx(other.kept[scale], rel=1e-4)
    assert all(read_recipe(file).dequantize for file in found.save(tmp_path / "best.yaml"))


@pytest.mark.parametrize("kind", ["gram", "gradient"])
def test_statistics(kind, adapters, codes, halves):
    found = collect_statistics(adapters[0], codes, TEXTS, kind=kind, **QUIET)
    wanted = collect_statistics(adapters[0], halves, TEXTS, kind=kind, progress=False)
    for module in wanted.shapes:
        torch.testing.assert_close(found.load(module), wanted.load(module), rtol=1e-5, atol=1e-6)


def test_a_metric(adapters, codes, halves):
    given = (adapters[:1] * 2, "flat", [1.0, 0.5])
    options = {"metric": "random", "rank": 4, "progress": False}
    found = merge_adapters(*given, base_model=codes, dequantize=True, **options)
    wanted = merge_adapters(*given, base_model=halves, **options)
    for module in wanted.modules:
        torch.testing.assert_close(found.delta(module), wanted.delta(module), rtol=1e-5, atol=1e-5)


def test_what_is_looked_at(adapters, codes, numbers):
    seen = inspect_adapter(adapters[1], codes, **QUIET), inspect_adapter(adapters[1], numbers)
    assert [one.norm for one in seen[0].modules.values()] == pytest.approx(
        [one.norm for one in seen[1].modules.values()], rel=1e-5
    )
    compared = compare_adapters(adapters, codes, **QUIET), compare_adapters(adapters, numbers)
    torch.testing.assert_close(compared[0].geometry.cosines, compared[1].geometry.cosines)


def test_distillation(adapters, codes, halves):
    start = merge_adapters(adapters[:1] * 2, "linear", [0.3, 0.2], progress=False)
    given, options = (start, adapters[:1] * 2, [TEXTS, TEXTS]), {"steps": 2, "new_tokens": 2}
    found = distill_merge(*given, codes, **options, **QUIET)
    wanted = distill_merge(*given, halves, progress=False, **options)
    assert found.history[0] == pytest.approx(wanted.history[0], rel=1e-5)


def test_an_export_that_is_verified_and_a_merge_that_is_loaded(merge, codes, numbers, tmp_path):
    done = export(merge, "peft", tmp_path / "out", base_model=codes, verified=True, **QUIET)
    assert done.verification.passed
    model = load_merged(codes, tmp_path / "out", dequantize=True, dtype=torch.float32)
    base = transformers.AutoModelForCausalLM.from_pretrained(numbers, dtype=torch.float32)
    wanted = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda a, base: evaluate(a[1], a, base, [TEXTS] * 2, cache=False, progress=False),
        lambda a, base: search(a, [TEXTS] * 2, base_model=base, optimiser="random"),
        lambda a, base: collect_statistics(a[0], base, TEXTS),
        lambda a, base: distill_merge(a[0], a[:1], [TEXTS], base),
        lambda a, base: merge_adapters(a[:1], "flat", metric="random", base_model=base),
        lambda a, base: compare_adapters(a, base),
        lambda a, base: export(a[0], "peft", "out", base_model=base, verified=True),
    ],
    ids=["evaluate", "search", "collect", "distill", "metric", "compare", "export"],
)
def test_a_quantised_base_is_refused_with_both_ways_out(
    call, adapters, codes, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelError, match=WAYS):
        call(adapters, codes)
    with pytest.raises(BaseModelError, match=rf"the model in memory {WAYS}"):
        load_base(Codes(), "CAUSAL_LM")


class Codes(torch.nn.Linear):
    """A layer whose weight is codes, as in a model of bitsandbytes in memory."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)


def test_the_commands_take_it(adapters, codes, tmp_path, capsys):
    base, one = ["--base-model", str(codes), "--dequantize"], str(adapters[0])
    (tmp_path / "texts.jsonl").write_text('{"text": "a b c"}')
    data = ["--data", str(tmp_path / "texts.jsonl")]
    commands = (
        ["inspect", str(adapters[1]), *base],
        ["compare", one, str(adapters[1]), *base],
        ["collect", one, *data, *base, "-o", str(tmp_path / "moments")],
        ["evaluate", one, "--adapters", one, *data, *base, "--no-cache"],
        ["distill", one, one, *data, *base, "-o", str(tmp_path / "out"), "--steps", "1"],
    )
    for command in commands:
        assert main(command) == 0, (command, capsys.readouterr().err)
