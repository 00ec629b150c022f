r"""Make the texts of two more tasks, `trec` and `banking`, which are not shipped: the eight tasks of `minilm8`.

    git clone https://github.com/hertz-pj/CNN-text-classification-pytorch
    git clone https://github.com/PolyAI-LDN/task-specific-datasets
    python benchmarks/quality/more_texts.py CNN-text-classification-pytorch/data/TREC \
        task-specific-datasets/banking_data

TREC (Li and Roth 2002) asks which of six kinds of answer a question wants; it has no clear licence. banking77
(Casanueva et al. 2020, CC BY 4.0) has requests to a bank: of its 77 intents, 50 make eight topics here.
"""

import argparse
import csv
import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path

from texts import FOLDER

KINDS = {
    "LOC": "location",
    "NUM": "number",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "ABBR": "abbreviation",
}
TOPICS = {
    "card arrival": "card_arrival card_delivery_estimate card_linking getting_spare_card order_physical_card",
    "lost or stolen card": "lost_or_stolen_card compromised_card lost_or_stolen_phone card_swallowed",
    "cash withdrawal": "cash_withdrawal_charge cash_withdrawal_not_recognised declined_cash_withdrawal "
    "pending_cash_withdrawal wrong_amount_of_cash_received wrong_exchange_rate_for_cash_withdrawal",
    "top up": "top_up_failed top_up_limits top_up_reverted topping_up_by_card top_up_by_bank_transfer_charge "
    "top_up_by_card_charge top_up_by_cash_or_cheque pending_top_up automatic_top_up verify_top_up",
    "transfer": "transfer_fee_charged transfer_into_account transfer_not_received_by_recipient transfer_timing "
    "failed_transfer declined_transfer pending_transfer cancel_transfer receiving_money beneficiary_not_allowed",
    "exchange": "exchange_charge exchange_rate exchange_via_app fiat_currency_support card_payment_wrong_exchange_rate",
    "identity": "verify_my_identity unable_to_verify_identity why_verify_identity verify_source_of_funds age_limit "
    "country_support",
    "pin": "change_pin pin_blocked passcode_forgotten get_physical_card",
}
SIZES = {"test": 1000, "validation": 500, "train": 4000}


def questions(folder: Path) -> Iterable[tuple[str, str]]:
    """Read TREC: lines of a kind in detail, the question, and its kind."""
    for name in ("train", "dev", "test"):
        for line in (folder / f"{name}.txt").read_text("utf-8", "replace").splitlines():
            if not line.strip():
                continue
            text, kind = line.strip().rsplit(None, 1)
            first, rest = text.split(None, 1)
            yield rest if first.isalpha() else text, KINDS[kind.split(":")[0]]


def requests(folder: Path) -> Iterable[tuple[str, str]]:
    """Read the requests of banking77 whose intent belongs to a topic."""
    topics = {intent: topic for topic, intents in TOPICS.items() for intent in intents.split()}
    for name in ("train", "test"):
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                if row["category"] in topics:
                    yield row["text"], topics[row["category"]]


def write(task: str, given: Iterable[tuple[str, str]], ask: str, labels: list[str]) -> None:
    """Write the splits of a task and its `task.json`, each text once."""
    rows = [*dict(given).items()]
    random.Random(0).shuffle(rows)
    sizes = {**SIZES, "test": min(SIZES["test"], len(rows) // 6)}
    sizes["validation"] = min(SIZES["validation"], len(rows) // 10)
    folder, start = FOLDER / task, 0
    folder.mkdir(exist_ok=True)
    for split, size in sizes.items():
        with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as stream:
            for text, answer in rows[start : start + size]:
                stream.write(json.dumps({"text": text, "answer": answer}) + "\n")
        start += size
    prompt = f"{ask} {', '.join(labels)}?\nAnswer:"
    content = json.dumps({"labels": labels, "prompt": prompt}, indent=1)
    (folder / "task.json").write_text(content + "\n", "utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Make both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trec", type=Path, help="folder with train.txt, dev.txt and test.txt")
    parser.add_argument("banking", type=Path, help="folder with train.csv and test.csv")
    parsed = parser.parse_args(arguments)
    ask = "Question: {text}\nWhat does the question ask for:"
    write("trec", questions(parsed.trec), ask, sorted(KINDS.values()))
    ask = "Request: {text}\nWhat is it about:"
    write("banking", requests(parsed.banking), ask, sorted(TOPICS))


if __name__ == "__main__":
    main()
