import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from pcb_peft import (
    Evaluation,
    MergedAdapter,
    MismatchError,
    OptionError,
    OutputError,
    evaluate,
    load_adapter,
    merge_adapters,
)
from pcb_peft.adapters.adapter import Adapter, DeltaMapping
from pcb_peft.adapters.source import Source
from pcb_peft.commands.demo import base_model_folder, examples_folder
from pcb_peft.data.batches import read_rows
from pcb_peft.data.models import load_tokenizer
from pcb_peft.evaluation.host import ModelHost
from pcb_peft.evaluation.pairing import pair
from pcb_peft.evaluation.runner import Runner
from pcb_peft.evaluation.tables import markdown_table
from pcb_peft.evaluation.texts import TextTask
from pcb_peft.runtime.progress import tracker
from pcb_peft.writing.manifest import foreign_file

pytestmark = pytest.mark.slow  # whole models: the parts are tested by themselves


TASKS = ("clinc_domain", "mr_sentiment", "snips_intent", "subj")
TEXTS = 16
LORA, DATA = examples_folder() / "lora", examples_folder() / "data"
ADAPTERS = [LORA / task for task in TASKS]
FILES = [DATA / f"{task}.jsonl" for task in TASKS]
BASE = base_model_folder()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def merged() -> MergedAdapter:
    """A merge that leaves one of its adapters out."""
    return merge_adapters(ADAPTERS, "linear", weights=[0, 0.5, 0.5, 0.5])


@pytest.fixture(scope="module")
def directory(merged: MergedAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("merges") / "three-of-four"
    merged.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def result(directory: Path, cache: Path) -> Evaluation:
    return evaluate(directory, ADAPTERS, BASE, FILES, limit=TEXTS, cache=cache)


def rows(task: str, count: int = TEXTS) -> list[dict[str, str]]:
    lines = (DATA / f"{task}.jsonl").read_text().splitlines()
    everything = [json.loads(line) for line in lines]
    return [everything[i * len(everything) // count] for i in range(count)]


def answers_of(task: str, adapter: Path | None, head: dict[str, torch.Tensor]) -> list[float]:
    """1 for each text that is right: with transformers and PEFT alone, one text at a time."""
    labels = json.loads((LORA / task / "task.json").read_text())["labels"]
    model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=len(labels))
    model.load_state_dict(head, strict=False)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model.eval()
    outcomes = []
    with torch.no_grad():
        for row in rows(task):
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
            outcomes.append(float(labels[int(logits.argmax())] == row["label"]))
    return outcomes


def test_the_task_that_was_left_out_is_found_and_named(result: Evaluation):
    assert result.lost == ("clinc_domain",)
    assert result.tasks[0].name == "clinc_domain"
    assert "LOST: keeps" in result.tasks[0].verdict
    first, second, *_ = str(result).splitlines()
    assert first.startswith("accuracy, %")
    assert second.startswith("clinc_domain")
    assert "LOST: clinc_domain" in str(result).splitlines()


def test_the_outcomes_are_those_of_transformers_and_peft(result: Evaluation, directory: Path):
    task = "clinc_domain"
    head = load_file(directory / "heads" / f"{task}.safetensors")
    assert list(result[task].merged.outcomes) == answers_of(task, directory, head)
    assert list(result[task].base.outcomes) == answers_of(task, None, head)
    assert result[task].adapter is not None
    assert list(result[task].adapter.outcomes) == answers_of(task, LORA / task, {})


def test_a_merge_in_memory_is_measured_like_its_directory(
    merged: MergedAdapter, result: Evaluation, cache: Path
):
    found = evaluate(merged, ADAPTERS[2:], BASE, FILES[2:], limit=TEXTS, cache=cache)
    for task in TASKS[2:]:
        assert found[task].merged == result[task].merged


@pytest.mark.slow
def test_a_folded_merge_is_measured_like_the_adapter(
    merged: MergedAdapter, result: Evaluation, tmp_path: Path
):
    merged.fold(BASE, tmp_path / "folded")
    options = {"limit": TEXTS, "cache": False, "adapters": [ADAPTERS[3]], "data": [FILES[3]]}
    found = evaluate(tmp_path / "folded", base_model=BASE, **options)
    assert found["subj"].merged == result["subj"].merged
    dense = merge_adapters(ADAPTERS, "linear", weights=[0, 0.5, 0.5, 0.5], rank="full")
    assert evaluate(dense, base_model=BASE, **options)["subj"].merged == result["subj"].merged


@pytest.mark.slow
def test_outcomes_come_from_the_cache(directory: Path, tmp_path: Path):
    def run() -> float:
        return (
            evaluate(directory, [ADAPTERS[3]], BASE, [FILES[3]], limit=8, cache=tmp_path)
            .tasks[0]
            .merged.value
        )

    first = run()
    kept = [path for path in tmp_path.rglob("*.json") if "outcomes" in path.read_text()]
    for path in kept:
        content = json.loads(path.read_text())
        if isinstance(content["outcomes"], list):
            content["outcomes"] = [0.0] * 8
            path.write_text(json.dumps(content))
    assert first > 0.5
    assert run() == 0
    other = evaluate(directory, [ADAPTERS[3]], BASE, [FILES[3]], limit=9, cache=tmp_path)
    assert other.tasks[0].merged.value > 0.5


def test_a_model_that_computes_nan_is_refused(tmp_path: Path):
    """The largest of its logits is the first one, and so many answers are right."""
    adapter = load_adapter(ADAPTERS[0])
    adapter.scaled(1e30).save_pretrained(tmp_path / "large")
    with pytest.raises(OptionError, match=r"clinc_domain: the model computes nan.*--dtype"):
        evaluate(tmp_path / "large", [ADAPTERS[0]], BASE, [FILES[0]], limit=2, cache=False)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "llama", "xlm-roberta"])
def test_a_tokenizer_that_transformers_makes_up_is_none(kind: str, tmp_path: Path):
    """It knows no word: all texts were the same to a model."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(OptionError, match=r"has no tokenizer.*--base-model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("content", "found"), [("", "there are no rows"), ("\n{}", "row 1 is {}")])
def test_what_is_wrong_with_a_file_names_it(content: str, found: str, tmp_path: Path):
    (tmp_path / "math.jsonl").write_text(content)
    with pytest.raises(OptionError, match=f"math.jsonl, {found}"):
        read_rows(tmp_path / "math.jsonl")


def test_a_function_measures(directory: Path, cache: Path):
    seen = []

    def layers(model: torch.nn.Module) -> float:
        seen.append(isinstance(model, PeftModel))
        return sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters())

    found = evaluate(directory, [ADAPTERS[0]], BASE, {"clinc_domain": layers}, cache=cache)
    assert sorted(seen) == [False, True, True]
    assert found.tasks[0].metric == "score"
    assert (found.tasks[0].base.value, found.tasks[0].merged.value) == (0, 36)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "returned None"),
        (float("nan"), r"returned nan for \w+; it must return a finite number"),
        (float("-inf"), "returned -inf"),
    ],
)
def test_a_function_must_return_a_number(value: object, message: str, directory: Path):
    with pytest.raises(OptionError, match=message):
        evaluate(directory, [ADAPTERS[0]], BASE, [lambda _: value], cache=False)


@pytest.mark.parametrize("score", [0.0, -0.5])
def test_of_an_adapter_that_scores_nothing_nothing_is_kept(directory: Path, score: float):
    found = evaluate(directory, [ADAPTERS[0]], BASE, [lambda _: score], cache=False)
    assert (found.tasks[0].kept, found.mean_kept) == (None, None)
    assert f"scores {score:g}, of which nothing can be kept" in found.tasks[0].verdict
    assert "such as exp(-loss)" in str(found)


@pytest.mark.slow
def test_another_merge_and_controls_beside_it(directory: Path, cache: Path, tmp_path: Path):
    better = merge_adapters(ADAPTERS, "linear", weights=[1, 0, 0, 0])
    found = evaluate(
        directory,
        ADAPTERS,
        BASE,
        {"clinc_domain": FILES[0]},
        against=better,
        controls=True,
        limit=TEXTS,
        cache=cache,
        log=tmp_path / "log.jsonl",
    ).tasks[0]
    assert found.against is not None
    assert found.against == found.adapter
    assert found.controls.keys() == {"random", "soup"}
    assert found.controls["soup"].value > found.controls["random"].value
    line = json.loads((tmp_path / "log.jsonl").read_text())["tasks"][0]
    assert line["against_p_value"] < 0.05
    assert line["against"] == found.against.value


def test_the_card_gets_the_table_once(directory: Path, cache: Path):
    options = {"limit": TEXTS, "cache": cache, "write_to_card": True}
    evaluate(directory, ADAPTERS, BASE, FILES, **options)
    found = evaluate(directory, ADAPTERS, BASE, FILES, **options)
    text = (directory / "README.md").read_text()
    assert text.count("## Evaluation") == 1
    assert text.count(markdown_table(found.tasks)) == 1
    front = yaml.safe_load(text.split("---\n")[1])
    results = front["model-index"][0]["results"]
    assert {one["dataset"]["name"] for one in results} == set(TASKS)
    assert front["library_name"] == "peft"
    numbers = json.loads((directory / "evaluation.json").read_text())
    assert numbers["lost"] == ["clinc_domain"]
    assert foreign_file(directory) is None  # so that --overwrite may still replace it


def test_the_card_is_data_that_the_hub_reads(directory: Path, cache: Path):
    from huggingface_hub import ModelCard

    evaluate(directory, ADAPTERS, BASE, FILES, limit=TEXTS, cache=cache, write_to_card=True)
    results = ModelCard.load(directory / "README.md").data.eval_results
    assert {one.dataset_name for one in results} == set(TASKS)


def test_labels_that_the_head_does_not_know(tmp_path: Path, cache: Path):
    file = tmp_path / "snips_intent.jsonl"
    wrong = [
        {**row, "label": row["label"].replace("find creative", "search creative")}
        for row in rows("snips_intent")
    ]
    file.write_text("\n".join(map(json.dumps, wrong)))
    with pytest.raises(OptionError) as error:
        evaluate(ADAPTERS[2], [ADAPTERS[2]], BASE, [file], cache=cache)
    assert '--rename "search creative work=find creative work"' in str(error.value)
    assert "add to playlist" in str(error.value)
    rename = {"search creative work": "find creative work"}
    found = evaluate(ADAPTERS[2], [ADAPTERS[2]], BASE, [file], rename=rename, limit=4, cache=cache)
    assert found.tasks[0].kept == 1


@pytest.mark.slow
def test_a_head_whose_labels_nobody_names(tmp_path: Path, cache: Path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((ADAPTERS[3] / name).read_bytes())
    with pytest.raises(OptionError, match=r"the head has 2 rows.*objective, subjective"):
        evaluate(tmp_path, [tmp_path], BASE, [FILES[3]], cache=cache)
    labels = {tmp_path.name: ["objective", "subjective"]}
    found = evaluate(tmp_path, [tmp_path], BASE, [FILES[3]], labels=labels, limit=8, cache=cache)
    assert found.tasks[0].merged.value > 0.5
    for data in ([FILES[3]], [[{"text": "A", "label": 0}]]):
        with pytest.raises(OptionError, match="there are 3 labels"):
            evaluate(tmp_path, [tmp_path], BASE, data, labels={tmp_path.name: "abc"}, cache=cache)
    with pytest.raises(OptionError, match=r"'subjj', which is no task here; did you mean 'subj'\?"):
        evaluate(tmp_path, [ADAPTERS[3]], BASE, [FILES[3]], labels={"subjj": "ab"}, cache=cache)
    with pytest.raises(OptionError, match=r"arc_easy is for language models, .* SEQ_CLS"):
        evaluate(ADAPTERS[3], [ADAPTERS[3]], BASE, tasks=["arc_easy"], cache=cache)


def test_data_find_their_adapters(tmp_path: Path, directory: Path, cache: Path):
    by_folder = []
    for task in reversed(TASKS[2:]):
        (tmp_path / task).mkdir()
        file = tmp_path / task / "test.jsonl"
        file.write_text((DATA / f"{task}.jsonl").read_text())
        by_folder.append(file)
    found = evaluate(directory, ADAPTERS[2:], BASE, by_folder, limit=TEXTS, cache=cache)
    assert found["subj"].adapter is not None
    assert found["subj"].adapter.value > 0.8
    with pytest.raises(OptionError, match="nothing to measure on"):
        evaluate(directory, ADAPTERS, BASE, [], cache=cache)
    some = evaluate(directory, ADAPTERS, BASE, {"subj": FILES[3]}, limit=TEXTS, cache=cache)
    assert "clinc_domain, mr_sentiment, snips_intent" in some.notes[0]


def test_a_budget_of_tokens_cuts_the_texts(directory: Path, cache: Path):
    found = evaluate(
        directory, [ADAPTERS[3]], BASE, [FILES[3]], budget="1000 tokens", cache=cache
    ).tasks[0]
    assert 1 <= found.texts < 20


@pytest.mark.slow
def test_a_budget_of_time_cuts_the_texts(directory: Path):
    found = evaluate(directory, [ADAPTERS[3]], BASE, [FILES[3]], budget="1s", cache=False)
    assert 1 <= found.tasks[0].texts < 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"threshold": 2}, "threshold is 2"),
        ({"confidence": 1}, "confidence is 1"),
        ({"measure": "vibes"}, "measure is 'vibes'"),
        ({"measure": "loss"}, "encoder"),
        ({"budget": "long"}, "budget is 'long'"),
        ({"base_model": None, "adapters": []}, "base model is not known"),
    ],
)
def test_what_is_not_allowed(directory: Path, options: dict[str, object], message: str):
    arguments = {"adapters": [ADAPTERS[3]], "base_model": BASE, "data": [FILES[3]], "cache": False}
    with pytest.raises(OptionError, match=message):
        evaluate(directory, **{**arguments, **options})


def test_what_could_not_be_written_afterwards_is_refused_before_anything_runs(tmp_path: Path):
    def never(_: object) -> float:
        raise AssertionError("a model was run")

    def run(merged: object, **options: object):
        evaluate(merged, [ADAPTERS[3]], BASE, {"subj": never}, cache=False, **options)

    with pytest.raises(OptionError, match="the merge is in memory"):
        run(load_adapter(ADAPTERS[3]), write_to_card=True)
    with pytest.raises(OptionError, match="someone/merged is no directory here"):
        run("someone/merged", write_to_card=True)
    with pytest.raises(OutputError, match="does not exist"):
        run(ADAPTERS[3], log=tmp_path / "missing" / "log.jsonl")


@pytest.mark.slow
def test_the_host_is_the_base_model_again_after_each_adapter(directory: Path):
    host = ModelHost(str(BASE))
    heads = [load_adapter(path).head.read() for path in ADAPTERS]
    tokens = AutoTokenizer.from_pretrained(BASE)("what a day", return_tensors="pt")

    def logits(adapter: Path | None, head: int) -> torch.Tensor:
        source = None if adapter is None else Source(str(adapter))
        with torch.no_grad():
            return host.adapted("SEQ_CLS", source, heads[head])(**tokens).logits

    before = logits(None, 0)
    merged = logits(directory, 0)
    assert not torch.equal(merged, before)
    assert logits(directory, 3).shape == (1, 2)  # the head alone is another one
    assert logits(ADAPTERS[3], 3).shape == (1, 2)
    assert torch.equal(logits(directory, 0), merged)
    assert torch.equal(logits(None, 0), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [{"init_lora_weights": "pissa"}, {"modules_to_save": ["word_embeddings"]}]
)
def test_an_adapter_that_changes_the_base_leaves_nothing_behind(
    config: dict[str, object], tmp_path: Path
):
    model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=2)
    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", **config)
    changed = get_peft_model(model, lora)
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    changed.save_pretrained(tmp_path, save_embedding_layers=False)
    host = ModelHost(str(BASE))
    head = {"classifier.weight": torch.ones(2, 384), "classifier.bias": torch.zeros(2)}
    model = host.adapted("SEQ_CLS", None, head)
    before = {name: value.clone() for name, value in model.named_parameters()}
    host.adapted("SEQ_CLS", Source(str(tmp_path)), head)
    for name, value in host.adapted("SEQ_CLS", None, head).named_parameters():
        assert torch.equal(value, before[name]), name


def test_an_adapter_of_another_model_is_refused(tmp_path: Path):
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    with pytest.raises(MismatchError):
        evaluate(ADAPTERS[3], [ADAPTERS[3]], tmp_path, [FILES[3]], limit=2, cache=False)


def test_zero_shot_without_a_head(directory: Path, cache: Path):
    """The label whose name is nearest, by the mean of the encoder's outputs; the merge has no such head either."""
    plain = AutoModel.from_pretrained(BASE).eval()
    wearing = AutoModelForSequenceClassification.from_pretrained(BASE)
    merge = PeftModel.from_pretrained(wearing, directory).eval().get_base_model().base_model
    tokenizer = AutoTokenizer.from_pretrained(BASE)

    def embedded(model: torch.nn.Module, text: str) -> torch.Tensor:
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        return mean / mean.norm()

    some = rows("snips_intent", 10)
    labels = sorted({row["label"] for row in some})
    found = evaluate(directory, ADAPTERS, BASE, {"unseen": some}, cache=cache)["unseen"]
    assert (found.metric, found.adapter) == ("accuracy", None)
    for model, score in ((plain, found.base), (merge, found.merged)):
        names = torch.stack([embedded(model, label) for label in labels])
        texts = torch.stack([embedded(model, row["text"]) for row in some])
        nearest = (texts @ names.T).argmax(-1).tolist()
        wanted = [float(labels[n] == row["label"]) for n, row in zip(nearest, some, strict=True)]
        assert list(score.outcomes) == wanted
    assert found.base.value > 0.5  # of seven labels


@pytest.mark.slow
def test_bfloat16(directory: Path, result: Evaluation):
    """Half the digits move few answers, and are not confused with those of float32 in the cache."""
    options = {"limit": TEXTS, "cache": directory.parent / "cache-of-types"}
    given = directory, [ADAPTERS[3]], BASE, [FILES[3]]
    found = evaluate(*given, dtype=torch.bfloat16, **options)
    assert found.settings["dtype"] == "bfloat16"
    assert found["subj"].merged.value == pytest.approx(result["subj"].merged.value, abs=0.06)
    assert evaluate(*given, **options)["subj"].merged == result["subj"].merged
    kept = [path.read_text() for path in (directory.parent / "cache-of-types").rglob("*.json")]
    assert sum('"dtype": "torch.bfloat16"' in text for text in kept) == 3  # base, adapter, merge


def test_batches_are_of_like_length():
    """Little of a batch is padding, and the results come in the order of the texts."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    runner = Runner(tokenizer, torch.device("cpu"), 4, 64, tracker(False))
    texts = [runner.encode("word " * count) for count in (9, 1, 7, 3, 8, 2, 6, 4)]
    widths = []

    def measure(batch: dict[str, torch.Tensor]) -> list[int]:
        widths.append(batch["input_ids"].shape[1])
        return batch["attention_mask"].sum(-1).tolist()

    assert runner.run(texts, measure, "texts") == [11, 3, 9, 5, 10, 4, 8, 6]
    assert widths == [11, 6]


@pytest.mark.slow
def test_a_limit_is_spread_over_a_sorted_file(directory: Path, cache: Path):
    ordered = sorted(rows("subj", 100), key=lambda row: row["label"])
    found = evaluate(directory, [ADAPTERS[3]], BASE, [ordered], limit=10, cache=cache)["subj"]
    some = evaluate(directory, [ADAPTERS[3]], BASE, [ordered[::10]], cache=cache)["subj"]
    assert found.merged == some.merged


def test_an_adapter_that_does_no_better_than_a_guess_is_doubted(directory: Path, cache: Path):
    """Its labels are in another order than the rows of its head."""
    swapped = {"subjective": "objective", "objective": "subjective"}
    wrong = [{**row, "label": swapped[row["label"]]} for row in rows("subj")]
    notes = evaluate(directory, ADAPTERS, BASE, {"subj": wrong}, cache=cache).notes
    assert any(
        re.match(r"subj: its own adapter is right on \d.* a guess \(50.0%\)", n) for n in notes
    )
    notes = evaluate(directory, ADAPTERS, BASE, {"subj": rows("subj")}, cache=cache).notes
    assert not any("guess" in note for note in notes)


NUMBERS = {"subj": ["0", "1"], "mr_sentiment": ["LABEL_0", "LABEL_1"]}


@pytest.mark.parametrize("task", NUMBERS)
def test_labels_that_number_the_rows_of_the_head(directory: Path, cache: Path, task: str):
    """Of a CSV file, or of a model whose classes transformers has named."""
    names = json.loads((LORA / task / "task.json").read_text())["labels"]
    some = rows(task)
    wanted = evaluate(directory, ADAPTERS, BASE, {task: some}, cache=cache).tasks[0].merged
    numbered = [{**row, "label": NUMBERS[task][names.index(row["label"])]} for row in some]
    found = evaluate(directory, ADAPTERS, BASE, {task: numbered}, cache=cache).tasks[0].merged
    assert found == wanted
    wrong = [*numbered, {**numbered[0], "label": NUMBERS[task][0].replace("0", "2")}]
    with pytest.raises(OptionError, match=r"labels that the adapter does not know: .*2"):
        evaluate(directory, ADAPTERS, BASE, {task: wrong}, cache=cache)


@pytest.mark.parametrize(
    ("adapters", "files", "wanted"),
    [
        ("a b", "b.jsonl a.jsonl", {"a": "a.jsonl", "b": "b.jsonl"}),
        ("a a-b", "a-b-test.jsonl a_test.jsonl", {"a": "a_test.jsonl", "a-b": "a-b-test.jsonl"}),
        ("a b", "x/b/test.jsonl", {"b": "x/b/test.jsonl"}),
        ("a b", "one.jsonl two.jsonl", {"a": "one.jsonl", "b": "two.jsonl"}),
        ("a b", "one.jsonl b.jsonl", {"a": "one.jsonl", "b": "b.jsonl"}),
        (
            "a b",
            "b-test.jsonl two.jsonl",
            "b-test.jsonl is called after b, .* of a; .*--data NAME=FILE",
        ),
        ("a b", "one.jsonl", r"number of data: 1, of adapters: 2 \(a, b\)"),
        ("a b", "a.jsonl a-test.jsonl two.jsonl", "number of data: 3"),
    ],
)
def test_files_are_paired_by_name_or_in_order(
    adapters: str, files: str, wanted: dict[str, str] | str
):
    given = [Adapter(name=name, modules=DeltaMapping({})) for name in adapters.split()]
    if isinstance(wanted, str):
        with pytest.raises(OptionError, match=wanted):
            pair(given, files.split())
    else:
        assert {one.name: one.data for one in pair(given, files.split())[0]} == wanted


@pytest.mark.parametrize("labels", ["ab", "abcd", "aabb", "a" * 8 + "b" * 8])
def test_a_limit_takes_of_each_label_its_share_where_labels_take_turns(labels: str):
    given = [{"text": f"text {n}", "label": labels[n % len(labels)]} for n in range(800)]
    task = TextTask(name="turns", rows=tuple(given), measure="head")
    for count in (100, 200, 300):
        taken = [row["label"] for row in task.first(count).rows]
        assert len(taken) == count
        for label in set(labels):
            assert taken.count(label) / count == pytest.approx(1 / len(set(labels)), abs=0.15)
    in_order = [{"text": str(n), "label": "ab"[n // 400]} for n in range(800)]
    sorted_file = dataclasses.replace(task, rows=tuple(in_order))
    assert [row["text"] for row in sorted_file.first(4).rows] == ["0", "200", "400", "600"]
