"""Statistics of adapters: against hooks and gradients of PEFT's own model, and what two methods make of them."""

import dataclasses
import inspect
import json
import os
import textwrap

import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers
from definitions import regmean, sta
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pcb_peft import (
    AdapterError,
    BaseModelError,
    MismatchError,
    OptionError,
    OutputError,
    TaskStatistics,
    UnsupportedError,
    collect_statistics,
    load_adapter,
    merge,
    merge_adapters,
    open_statistics,
    read_recipe,
)
from pcb_peft.commands import cli
from pcb_peft.data import statistics_file
from pcb_peft.data.statistics_file import save_statistics

pytestmark = pytest.mark.slow  # whole models: the parts are tested by themselves


LAYERS = {
    "llama": ["q_proj", "down_proj", "v_proj"],
    "gpt2": ["c_attn", "c_proj"],  # Conv1D
    "bert": ["query", "output.dense", "pooler.dense"],  # the pooler sees one vector per text
}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}
KINDS = list(LAYERS)
every_model = pytest.mark.parametrize("model", KINDS)


def lora(model, **options):
    return peft.LoraConfig(
        **{
            "r": 3,
            "lora_alpha": 5,
            "target_modules": LAYERS[model],
            "task_type": TASKS[model],
            "fan_in_fan_out": model == "gpt2",
        }
        | options
    )


def batches(model, seed=0, sizes=((3, 7), (2, 5), (1, 9))):
    """Token ids, padded on the right with what is not to be seen, and labels."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for texts, length in sizes:
        ids = torch.randint(2, 32, (texts, length), generator=generator)
        lengths = torch.randint(2, length + 1, (texts, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        labels = torch.randint(0, 3, (texts,), generator=generator)
        if TASKS[model] == "CAUSAL_LM":
            labels = torch.where(mask.bool(), ids, -100)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def with_adapter(workshop, model, adapter):
    return peft.PeftModel.from_pretrained(workshop.model(model), adapter).eval()


def base_layers(peft_model, modules):
    return {
        module: peft_model.get_base_model().get_submodule(module).base_layer for module in modules
    }


def grams(workshop, model, adapter, data):
    """Mean of x xᵀ over all tokens that are no padding, float64, from the inputs of the layers under PEFT's."""
    peft_model = with_adapter(workshop, model, adapter)
    modules = load_adapter(adapter).modules
    inputs = {}
    for module, layer in base_layers(peft_model, modules).items():
        layer.register_forward_pre_hook(
            lambda _, x, m=module: inputs.setdefault(m, []).append(x[0])
        )
    with torch.no_grad():
        for batch in data:
            peft_model(**batch)
    found = {}
    for module, seen in inputs.items():
        rows = []
        for x, batch in zip(seen, data, strict=True):
            rows += [
                token
                for text, mask in zip(x, batch["attention_mask"], strict=True)
                for token in ([text] if x.ndim == 2 else text[mask.bool()])
            ]
        x = torch.stack(rows).double().numpy()
        tokens = sum(int(batch["attention_mask"].sum()) for batch in data)
        found[module] = x.T @ x / tokens
    return found


def gradients(workshop, model, adapter, data):
    """∂L/∂W, of the mean of the losses of all labels, by autograd on the base layer's weight, float64, (out, in)."""
    peft_model = with_adapter(workshop, model, adapter).double()
    layers = base_layers(peft_model, load_adapter(adapter).modules)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    total = count = 0
    for batch in data:
        logits = peft_model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        labels = batch["labels"]
        if TASKS[model] == "CAUSAL_LM":
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        count += int((labels != -100).sum())
    (total / count).backward()
    return {
        m: (layer.weight.grad.T if model == "gpt2" else layer.weight.grad).numpy()
        for m, layer in layers.items()
    }


EXPECTED = {"gram": grams, "gradient": gradients}
every_kind = pytest.mark.parametrize("kind", EXPECTED)


def pool(workshop, model, count=3):
    return workshop.adapters(model, [lora(model, r=2 + i) for i in range(count)])


def collected(workshop, model, adapters, kind):
    """A file per adapter, each of other data."""
    return [
        collect_statistics(
            adapter,
            workshop.model(model),
            Loader(batches(model, seed)),
            adapter.parent / f"{adapter.name}.{kind}.safetensors",
            kind,
        )
        for seed, adapter in enumerate(adapters)
    ]


class Loader:
    """Batches that can be gone through again."""

    def __init__(self, made):
        self._made = made

    def __iter__(self):
        return iter(self._made)


# -------------------------------------------------------------------------------------- what is measured


@every_kind
@every_model
def test_statistics_are_those_of_the_model_that_peft_loads(workshop, model, kind):
    adapter = workshop.adapter(model, lora(model))
    (found,) = collected(workshop, model, [adapter], kind)
    wanted = EXPECTED[kind](workshop, model, adapter, batches(model))
    assert set(found.shapes) == set(wanted) == set(load_adapter(adapter).modules)
    for module, value in wanted.items():
        assert found.load(module).dtype == torch.float32
        workshop.assert_close(found.load(module), torch.from_numpy(value), 1e-5, module)


@every_kind
def test_the_base_model_s_checkpoint_gives_what_the_model_gives(workshop, kind):
    adapter = workshop.adapter("llama", lora("llama"))
    of_model = collected(workshop, "llama", [adapter], kind)[0]
    of_files = collect_statistics(
        adapter, workshop.base("llama"), Loader(batches("llama")), kind=kind
    )
    for module in of_model.shapes:
        workshop.assert_close(of_files.load(module), of_model.load(module), 1e-6, module)


@every_kind
def test_memory_changes_the_number_of_passes_and_nothing_else(workshop, kind):
    adapter = workshop.adapter("bert", lora("bert"))
    passes = []

    class Counted(Loader):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    data = Counted(batches("bert"))
    found = [
        collect_statistics(adapter, workshop.model("bert"), data, kind=kind, max_memory=memory)
        for memory in (1, 1 << 30)
    ]
    assert len(passes) == len(found[0].shapes) + 1
    for module in found[0].shapes:
        assert torch.equal(found[0].load(module), found[1].load(module))


def test_a_model_that_was_handed_over_is_rid_of_the_adapter(workshop):
    model = workshop.model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = workshop.adapter("llama", lora("llama"))
    collect_statistics(adapter, model, Loader(batches("llama")))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


# ------------------------------------------------------------------------------------------------- texts


WORDS = ["a", "cat", "dog", "sat", "ran", "on", "the", "mat", "road", "fast", "and", "slow"]


@pytest.fixture
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]"
    )


ROWS = [
    {"text": "the cat sat on the mat", "label": 0, "answer": "and ran"},
    {"text": "a dog", "label": 2, "answer": "sat"},
    {"text": "slow road and fast cat ran", "label": "two", "answer": "on the road"},
]


def as_batch(model, answers):
    """The rows in one batch, by hand."""
    number = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    texts = [[number[word] for word in row["text"].split()] for row in ROWS]
    rest = [[number[word] for word in row["answer"].split()] if answers else [] for row in ROWS]
    width = max(len(t) + len(r) for t, r in zip(texts, rest, strict=True))
    ids, mask, labels = torch.zeros(3, width).long(), torch.zeros(3, width).long(), []
    for i, (text, answer) in enumerate(zip(texts, rest, strict=True)):
        size = len(text) + len(answer)
        ids[i, :size], mask[i, :size] = torch.tensor(text + answer), 1
        learnt = torch.full((width,), -100)
        start = len(text) if answers else 0
        learnt[start:size] = ids[i, start:size]
        labels.append(learnt)
    labels = torch.stack(labels) if TASKS[model] == "CAUSAL_LM" else torch.tensor([0, 2, 1])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@every_kind
@pytest.mark.parametrize(("model", "answers"), [("llama", True), ("llama", False), ("bert", False)])
def test_texts_are_padded_and_labelled(workshop, tokenizer, tmp_path, model, kind, answers):
    adapter = workshop.adapter(model, lora(model))
    dropped = () if answers else ("answer",)
    rows = [{k: v for k, v in row.items() if k not in dropped} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    wanted = EXPECTED[kind](workshop, model, adapter, [as_batch(model, answers)])
    for data, size in ((rows, 3), (rows, 1), (tmp_path / "rows.jsonl", 2)):
        found = collect_statistics(
            adapter,
            workshop.model(model),
            data,
            kind=kind,
            tokenizer=tokenizer,
            labels=["one", "two", "three"],
            batch_size=size,
        )
        for module, value in wanted.items():
            workshop.assert_close(found.load(module), torch.from_numpy(value), 1e-5, module)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gram", "gradient"])
def test_two_processes_measure_what_one_does(workshop, tokenizer, tmp_path, launch, kind):
    """To 1e-5: they add up in another order. Five texts in batches of two: the processes have unequal shares."""
    base, adapter = workshop.base("llama"), workshop.adapter("llama", lora("llama"))
    tokenizer.save_pretrained(base)
    texts = [*(row["text"] for row in ROWS), "a mat", "the slow dog ran on"]
    data, both = tmp_path / "rows.jsonl", tmp_path / "both"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    one = collect_statistics(adapter, base, data, kind=kind, batch_size=2, max_memory="3K")
    words = ["-m", "pcb_peft", "collect", adapter, "--base-model", base, "--data", data, "-o", both]
    words += ["--kind", kind, "--batch-size", "2", "--max-memory", "3K"]
    codes, _, errors = launch(2, words, ACCELERATE_USE_CPU="true")
    assert not any(codes), errors
    two = open_statistics(both)
    assert one.count == two.count
    for module in one.shapes:
        workshop.assert_close(two.load(module), one.load(module), 1e-5, module)


# ------------------------------------------------------------------------------------------------ RegMean


WEIGHTS = (1.0, 0.5, -2.0)


def oriented(model, delta):
    return (delta.T if model == "gpt2" else delta).numpy()


@pytest.fixture(scope="module", params=KINDS)
def regression(request, shared_workshop, tmp_path_factory):
    """A model's kind; its adapters, their statistics, and by adapter ΔW and the Gram matrices of each module."""
    model = request.param
    workshop = type(shared_workshop)(tmp_path_factory.mktemp(model))
    adapters = pool(workshop, model)
    statistics = collected(workshop, model, adapters, "gram")
    deltas = [workshop.deltas(model, adapter) for adapter in adapters]
    own = [grams(workshop, model, a, batches(model, seed)) for seed, a in enumerate(adapters)]
    return model, adapters, statistics, deltas, own


@pytest.mark.parametrize("space", ["auto", "dense"])
@pytest.mark.parametrize("alpha", [0.9, 0.1, 0.0])
def test_regmean_is_the_regression_on_the_inputs_of_all(workshop, regression, alpha, space):
    model, adapters, statistics, deltas, own = regression
    merged = merge_adapters(
        adapters, "regmean", WEIGHTS, space, rank="full", statistics=statistics, alpha=alpha
    )
    for module in merged.modules:
        wanted = regmean(
            [oriented(model, d[module]) for d in deltas], [g[module] for g in own], WEIGHTS, alpha
        )
        found = torch.from_numpy(oriented(model, merged.delta(module)))
        workshop.assert_close(found, torch.from_numpy(wanted), 1e-4, module)


def test_regmean_leaves_at_most_the_sum_of_the_ranks(workshop):
    adapters = pool(workshop, "llama")
    statistics = collected(workshop, "llama", adapters, "gram")
    merged = merge_adapters(adapters, "regmean", statistics=statistics)
    for delta in merged.modules.values():
        assert delta.rank == min(2 + 3 + 4, *delta.shape)
    assert merged.report.energy == pytest.approx(1)


def test_an_adapter_that_is_alone_is_what_it_was(workshop):
    adapters = pool(workshop, "llama", 1)
    statistics = collected(workshop, "llama", adapters, "gram")
    merged = merge_adapters(adapters, "regmean", statistics=statistics)
    workshop.assert_deltas(merged, workshop.deltas("llama", adapters[0]))


def in_memory(kind, values):
    """Statistics that somebody vouches for."""
    shapes = {module: tuple(value.shape) for module, value in values.items()}
    return TaskStatistics(kind, shapes, values.__getitem__)


def test_equal_inputs_give_the_mean(workshop):
    """(Σ ΔW_t G)(T G)⁻¹ = Σ ΔW_t / T, whatever G is."""
    adapters = pool(workshop, "llama")
    deltas = [workshop.deltas("llama", adapter) for adapter in adapters]
    rng = np.random.default_rng(0)
    inputs = {m: torch.from_numpy(rng.normal(size=(50, d.shape[1]))) for m, d in deltas[0].items()}
    same = in_memory("gram", {m: (x.T @ x).float() for m, x in inputs.items()})
    for alpha in (0.0, 0.9, 1.0):
        merged = merge_adapters(adapters, "regmean", statistics=[same] * 3, alpha=alpha)
        mean = {m: sum(d[m] for d in deltas) / 3 for m in deltas[0]}
        workshop.assert_deltas(merged, mean, 1e-5)


def test_inputs_that_no_task_has_are_left_alone_and_others_are_answered(workshop):
    """Each task's inputs are in a plane of its own: there the merge does what its adapter does."""
    adapters = pool(workshop, "llama", 2)
    deltas = [workshop.deltas("llama", adapter) for adapter in adapters]
    planes = [slice(0, 4), slice(6, 9)]
    statistics = []
    for plane in planes:
        values = {}
        for m, d in deltas[0].items():
            x = torch.randn(9, d.shape[1], generator=torch.Generator().manual_seed(1))
            kept = torch.zeros_like(x)
            kept[:, plane] = x[:, plane]
            values[m] = kept.T @ kept
        statistics.append(in_memory("gram", values))
    for alpha in (0.9, 1.0):
        merged = merge_adapters(
            adapters, "regmean", statistics=statistics, alpha=alpha, rank="full"
        )
        for m in merged.modules:
            wanted = torch.zeros_like(deltas[0][m])
            for d, plane in zip(deltas, planes, strict=True):
                wanted[:, plane] = d[m][:, plane]
            workshop.assert_close(merged.delta(m), wanted, 1e-4, m)


# ---------------------------------------------------------------------------------------------------- STA


@every_model
def test_sta_keeps_what_the_loss_depends_on(workshop, model):
    adapters = pool(workshop, model)
    statistics = collected(workshop, model, adapters, "gradient")
    merged = merge_adapters(
        adapters, "sta", WEIGHTS, "dense", "module", "full", statistics=statistics, density=0.3
    )
    deltas = [workshop.deltas(model, adapter) for adapter in adapters]
    own = [gradients(workshop, model, a, batches(model, seed)) for seed, a in enumerate(adapters)]
    for module in merged.modules:
        wanted = sta(
            [oriented(model, d[module]) for d in deltas], [g[module] for g in own], WEIGHTS, 0.3
        )
        found = torch.from_numpy(oriented(model, merged.delta(module)))
        workshop.assert_close(found, torch.from_numpy(wanted), 1e-5, module)


def test_in_core_space_the_gradient_is_turned_as_the_task_vectors_are(workshop):
    adapters = pool(workshop, "llama", 2)
    statistics = collected(workshop, "llama", adapters, "gradient")
    merged = merge_adapters(
        adapters, "sta", None, "core", "module", statistics=statistics, density=0.4
    )
    for module in merged.modules:
        x = [workshop.deltas("llama", adapter)[module].numpy() for adapter in adapters]
        u, s, _ = np.linalg.svd(np.concatenate(x, axis=1), full_matrices=False)
        _, q, vh = np.linalg.svd(np.concatenate(x), full_matrices=False)
        u, vh = u[:, s > 1e-6 * s[0]], vh[q > 1e-6 * q[0]]
        g = [some.load(module).double().numpy() for some in statistics]
        turned = [[u.T @ matrix @ vh.T for matrix in matrices] for matrices in (x, g)]
        wanted = torch.from_numpy(u @ sta(*turned, (1, 1), 0.4) @ vh)
        workshop.assert_close(merged.delta(module), wanted, 1e-5, module)


@pytest.mark.parametrize(("method", "kind"), [("regmean", "gram"), ("sta", "gradient")])
def test_the_factors_do_not_matter(workshop, method, kind):
    adapters = pool(workshop, "llama", 2)
    statistics = collected(workshop, "llama", adapters, kind)
    wanted = merge_adapters(adapters, method, statistics=statistics, rank="full")
    generator = torch.Generator().manual_seed(0)

    def regauged(tensors):
        for name in [name for name in tensors if "lora_A" in name]:
            other = name.replace("lora_A", "lora_B")
            r = len(tensors[name])
            G = torch.randn(r, r, generator=generator, dtype=torch.float64) + 2 * torch.eye(r)
            tensors[other] = (tensors[other].double() @ G).float()
            tensors[name] = torch.linalg.solve(G, tensors[name].double()).float().contiguous()
        return tensors

    for adapter in adapters:
        workshop.edit_tensors(adapter, regauged)
    again = [dataclasses.replace(some, sha256=None) for some in statistics]
    found = merge_adapters(adapters, method, statistics=again, rank="full")
    for module in wanted.modules:
        workshop.assert_close(found.delta(module), wanted.delta(module), 1e-4, module)


# ------------------------------------------------------------------------------------- files and recipes


@pytest.mark.parametrize(("method", "kind"), [("regmean", "gram"), ("sta", "gradient")])
def test_a_recipe_knows_its_statistics_and_gives_the_same_bytes(workshop, tmp_path, method, kind):
    adapters = pool(workshop, "llama", 2)
    files = [some.source.path for some in collected(workshop, "llama", adapters, kind)]
    merge_adapters(adapters, method, statistics=files).save_pretrained(tmp_path / "once")
    recipe = read_recipe(tmp_path / "once" / "merge_recipe.yaml")
    assert [source.path for source in recipe.statistics] == files
    merge(recipe).save_pretrained(tmp_path / "twice")
    for name in ("adapter_model.safetensors", "merge_recipe.yaml"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    tensors = load_file(files[0])
    with_metadata = open_metadata(files[0])
    save_file({m: 2 * x for m, x in tensors.items()}, files[0], metadata=with_metadata)
    with pytest.raises(AdapterError, match=r"has changed.*take sha256 out of the recipe"):
        merge(recipe)


def open_metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_from_texts_to_a_merge_on_the_command_line(workshop, tokenizer, tmp_path, capsys):
    base, adapters = workshop.base("llama"), pool(workshop, "llama", 2)
    tokenizer.save_pretrained(base)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": r["text"]}) for r in ROWS))
    files = [str(tmp_path / f"{adapter.name}.safetensors") for adapter in adapters]
    for adapter, file in zip(adapters, files, strict=True):
        words = ["collect", str(adapter), "--base-model", str(base), "-o", file]
        assert cli.main([*words, "--data", str(tmp_path / "rows.jsonl")]) == 0
    assert "gram of 6 modules over 14 tokens" in capsys.readouterr().out
    words = ["merge", *map(str, adapters), "--method", "regmean", "--statistics", *files]
    assert cli.main([*words, "-o", str(tmp_path / "out")]) == 0
    wanted = merge_adapters(adapters, "regmean", statistics=files)
    found = load_adapter(tmp_path / "out")
    for module in wanted.modules:
        workshop.assert_close(found.delta(module), wanted.delta(module), 1e-6)


def test_what_does_not_fit_is_refused_before_a_merge(workshop):
    adapters = pool(workshop, "llama", 2)
    one, two = collected(workshop, "llama", adapters, "gram")
    (other,) = collected(workshop, "llama", adapters[:1], "gradient")

    def refused(error, words, *statistics, adapters=adapters, method="regmean", **options):
        with pytest.raises(error, match=words):
            merge_adapters(adapters, method, statistics=statistics, **options)

    refused(OptionError, "regmean needs statistics of kind gram.*there are none.*pcb-peft collect")
    refused(OptionError, "2 adapters and 1 statistics", one)
    refused(OptionError, "of kinds gradient and gram", other, two)
    refused(MismatchError, "collected with an adapter whose tensors have SHA-256", two, one)
    refused(OptionError, "those given are of kind gram", one, two, method="sta")
    refused(OptionError, "linear needs none", one, two, method="linear")
    refused(
        OptionError,
        "space factor, which has no gram.*core, dense, knots",
        one,
        two,
        space="factor",
    )
    lacking = dataclasses.replace(one, shapes={})
    refused(MismatchError, "down_proj is missing; collect", lacking, two)
    with pytest.raises(AdapterError, match="is not a file of task statistics"):
        merge_adapters(
            adapters, "regmean", statistics=[adapters[0] / "adapter_model.safetensors"] * 2
        )
    with pytest.raises(AdapterError, match="cannot be read"):
        merge_adapters(adapters, "regmean", statistics=["nowhere", "nowhere"])


def test_what_cannot_be_measured_is_refused(workshop, tmp_path):
    adapter = workshop.adapter("llama", lora("llama"))
    model, data = workshop.model("llama"), Loader(batches("llama"))

    def refused(error, words, *arguments, **options):
        with pytest.raises(error, match=words):
            collect_statistics(*arguments, **options)

    refused(OptionError, "kind is 'fisher'", adapter, model, data, kind="fisher")
    (tmp_path / "there").write_text("")
    refused(OutputError, "exists; name another file", adapter, model, data, tmp_path / "there")
    refused(OutputError, "no, which does not exist", adapter, model, data, tmp_path / "no/where")
    refused(BaseModelError, "cannot be loaded", adapter, tmp_path, data)
    refused(
        MismatchError, "PEFT put no adapter|does not fit", adapter, workshop.model("gpt2"), data
    )
    refused(OptionError, "row 1 is .*string `text`", adapter, model, [{"words": 1}])
    refused(OptionError, "there are no rows", adapter, model, [])
    refused(OptionError, "no token", adapter, model, Loader([]))
    (tmp_path / "bad.jsonl").write_text("{")
    refused(OptionError, "line 1 is not JSON", adapter, model, tmp_path / "bad.jsonl")
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in data]
    refused(OptionError, "no labels", adapter, model, Loader(unlabelled), kind="gradient")
    refused(
        OptionError,
        "row 1 has label 'x'; it must be a number",
        workshop.adapter("bert", lora("bert"), "bert"),
        workshop.model("bert"),
        [{"text": "", "label": "x"}],
        kind="gradient",
    )
    ia3 = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    directory = workshop.adapter("llama", ia3, "ia3")
    refused(UnsupportedError, "is an .IA.³ adapter", directory, model, data)


def test_gram_needs_no_labels_and_does_not_look_at_them(workshop, tokenizer):
    adapter, model = workshop.adapter("bert", lora("bert")), workshop.model("bert")
    found = [
        collect_statistics(
            adapter, model, [row | {"label": label} for row in ROWS], tokenizer=tokenizer
        )
        for label in ("positive", None, 1)
    ]
    wanted = EXPECTED["gram"](workshop, "bert", adapter, [as_batch("bert", answers=False)])
    for module, value in wanted.items():
        for statistics in found:
            workshop.assert_close(statistics.load(module), torch.from_numpy(value), 1e-5, module)


def test_a_causal_language_model_needs_no_label_of_a_classifier(workshop, tokenizer):
    adapter, model = workshop.adapter("llama", lora("llama")), workshop.model("llama")
    rows = [row | {"label": "positive"} for row in ROWS]
    found = collect_statistics(adapter, model, rows, kind="gradient", tokenizer=tokenizer)
    wanted = EXPECTED["gradient"](workshop, "llama", adapter, [as_batch("llama", answers=True)])
    for module, value in wanted.items():
        workshop.assert_close(found.load(module), torch.from_numpy(value), 1e-5, module)


def test_a_model_that_the_adapter_does_not_fit_is_rid_of_it_too(workshop):
    adapter = workshop.adapter("llama", lora("llama"))
    model = workshop.model("llama")
    del model.model.layers[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MismatchError):
        collect_statistics(adapter, model, Loader(batches("llama")))
    after = model.state_dict()
    assert before.keys() == after.keys()


# ------------------------------------------------------------------------------------------- the file


SMALL = {"layer": torch.arange(4.0).view(2, 2)}


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_a_file_of_statistics_comes_back_and_has_the_mode_of_the_umask(tmp_path, umask):
    file = tmp_path / "grams.safetensors"
    save_statistics(in_memory("gram", SMALL), file)
    found = open_statistics(file)
    assert torch.equal(found.load("layer"), SMALL["layer"])
    assert (found.kind, found.sha256) == ("gram", None)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_while_statistics_are_written_leaves_the_old_file(tmp_path):
    file = tmp_path / "grams.safetensors"
    save_statistics(in_memory("gram", SMALL), file)
    old = file.read_bytes()

    def stop(_):
        raise KeyboardInterrupt

    broken = dataclasses.replace(in_memory("gram", SMALL), load=stop)
    with pytest.raises(KeyboardInterrupt):
        save_statistics(broken, file, overwrite=True)
    assert file.read_bytes() == old
    assert list(tmp_path.iterdir()) == [file]


def test_the_example_of_collect_statistics_runs(workshop, tokenizer, tmp_path, monkeypatch):
    base = workshop.base("llama")
    tokenizer.save_pretrained(base)
    adapters = pool(workshop, "llama", 2)
    for name, path in (("base", base), ("math-lora", adapters[0]), ("code-lora", adapters[1])):
        (tmp_path / name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    example = inspect.getdoc(collect_statistics).partition("Example:\n")[2]
    names = {}
    exec(textwrap.dedent(example), names)
    assert names["merged"].recipe.method == "regmean"
    assert {"math.safetensors", "code.safetensors"} < {p.name for p in tmp_path.iterdir()}


def with_value(value):
    def changed(gram):
        gram = gram.clone()
        gram.view(-1)[0] = value
        return gram

    return changed


UNUSABLE = {
    "NaN": (with_value(float("nan")), {}, "holds NaN"),
    "infinite": (with_value(float("inf")), {}, "holds NaN or infinite"),
    "integers": (lambda gram: gram.int(), {}, "numbers of type I32"),
    "truth values": (lambda gram: gram > 0, {}, "numbers of type BOOL"),
    "no count": (lambda gram: gram, {"count": None}, "count is ''"),
    "a word for a count": (lambda gram: gram, {"count": "x"}, "count is 'x'"),
    "a count of 5000 digits": (lambda gram: gram, {"count": "9" * 5000}, "count is '999"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_statistics_that_cannot_be_used_are_refused(tmp_path, case):
    change, fields, message = UNUSABLE[case]
    metadata = {"format": statistics_file.FORMAT, "kind": "gram", "count": "9"} | fields
    file = tmp_path / "grams.safetensors"
    tensors = {name: change(gram).contiguous() for name, gram in SMALL.items()}
    save_file(tensors, file, {key: value for key, value in metadata.items() if value is not None})
    with pytest.raises(AdapterError, match=message) as caught:
        open_statistics(file).of("layer", (8, SMALL["layer"].shape[0]))
    assert len(str(caught.value)) < 1000


def test_a_file_that_holds_no_statistics_is_not_replaced_by_some(tmp_path):
    file = tmp_path / "notes.safetensors"
    file.write_text("of the user")
    with pytest.raises(OutputError, match=r"did not write.+--overwrite-all"):
        save_statistics(in_memory("gram", SMALL), file, overwrite=True)
    save_statistics(in_memory("gram", SMALL), file, overwrite="all")
    assert open_statistics(file).kind == "gram"
