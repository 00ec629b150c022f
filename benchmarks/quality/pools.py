"""The pools: which adapters are trained, on which base model, and how."""

import dataclasses

from bases import MINILM, MPNET, SMOLLM2

SIX = ("clinc_domain", "mr_sentiment", "nli_cad", "sms_spam", "snips_intent", "subj")
EIGHT = (*SIX, "g2p", "restaurant_slots")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One adapter of a pool.

    Attributes:
        name: The adapter's name.
        task: What it is trained on.
        kind: lora, ia3, or full: a fine-tune of all weights.
        rank: Of a LoRA; alpha is the same number.
        rate: Learning rate at its highest.
        steps: Updates.
        batch: Texts per update.
        seed: Of the order of the texts, the dropout, and of lora_A unless it is shared.
        shared_init: True if lora_A begins as in all other members that share it.
        part: Which part of the texts it is trained on, and into how many they are cut; None: all.
    """

    name: str
    task: str
    kind: str = "lora"
    rank: int = 16
    rate: float = 1e-3
    steps: int = 250
    batch: int = 16
    seed: int = 0
    shared_init: bool = False
    part: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Pool:
    """Adapters of one base model, to be merged with each other.

    Attributes:
        name: Its name.
        base: Its base model, as `bases.base_model` knows it.
        members: The adapters.
        length: Tokens of a text in training.
    """

    name: str
    base: str
    members: tuple[Member, ...]
    length: int = 64

    @property
    def causal(self) -> bool:
        """True if the base model is a language model, which is asked in words."""
        return self.base == SMOLLM2


def _more() -> tuple[Member, ...]:
    """Two tasks whose texts `more_texts.py` makes."""
    return tuple(
        Member(name=task, task=task, batch=24, steps=275, seed=seed)
        for seed, task in enumerate(("trec", "banking"), len(SIX))
    )


def _smollm2() -> tuple[Member, ...]:
    """Uneven, as adapters of different people are: other ranks, learning rates and numbers of steps."""
    how = {
        "snips_intent": (16, 5e-4, 150),
        "subj": (16, 1e-3, 120),
        "clinc_domain": (16, 1e-3, 200),
        "mr_sentiment": (8, 1e-3, 150),
        "sms_spam": (8, 1e-3, 100),
        "nli_cad": (32, 1e-3, 300),
        "restaurant_slots": (16, 2e-3, 200),
        "g2p": (32, 2e-3, 250),
    }
    return tuple(
        Member(name=task, task=task, rank=rank, rate=rate, steps=steps, batch=8, seed=seed)
        for seed, (task, (rank, rate, steps)) in enumerate(how.items())
    )


def _mpnet() -> tuple[Member, ...]:
    how = {
        "clinc_domain": (16, 1e-3, 200),
        "mr_sentiment": (8, 1e-3, 150),
        "nli_cad": (32, 1e-3, 350),
        "sms_spam": (8, 1e-3, 100),
        "snips_intent": (16, 2e-3, 150),
        "subj": (32, 5e-4, 120),
    }
    return tuple(
        Member(name=task, task=task, rank=rank, rate=rate, steps=steps, seed=seed)
        for seed, (task, (rank, rate, steps)) in enumerate(how.items())
    )


def _full() -> tuple[Member, ...]:
    """Fine-tunes of all weights; inference learns nothing at the rate of the others."""
    slower = Member(name="nli_cad", task="nli_cad", kind="full", rate=3e-5, steps=500, seed=2)
    return tuple(
        slower if member.name == slower.name else member
        for member in _all(SIX, kind="full", rate=1e-4)
    )


def _again(number: int) -> tuple[Member, ...]:
    """The six tasks with other seeds."""
    return tuple(
        Member(name=f"{task}-{number}", task=task, seed=100 * number + seed)
        for seed, task in enumerate(SIX)
    )


def _all(tasks: tuple[str, ...], **how: object) -> tuple[Member, ...]:
    return tuple(
        Member(name=task, task=task, seed=seed, **how)  # type: ignore[arg-type]
        for seed, task in enumerate(tasks)
    )


POOLS = {
    pool.name: pool
    for pool in (
        Pool("minilm", MINILM, _all(SIX)),
        Pool("minilm-second", MINILM, _again(2)),
        Pool("minilm-third", MINILM, _again(3)),
        Pool("minilm8", MINILM, (*_all(SIX), *_more())),
        Pool("minilm-ia3", MINILM, _all(SIX, kind="ia3", rate=1e-2, steps=300)),
        Pool("smollm2", SMOLLM2, _smollm2(), length=96),
        Pool("mpnet", MPNET, _mpnet()),
        Pool(
            "minilm-runs",
            MINILM,
            tuple(
                Member(
                    name=f"run{n}",
                    task="mr_sentiment",
                    rank=rank,
                    rate=rate,
                    steps=150,
                    seed=10 + n,
                )
                for n, (rank, rate) in enumerate([(16, 1e-3), (16, 5e-4), (8, 1e-3), (32, 5e-4)])
            ),
        ),
        Pool("minilm-shared", MINILM, _all(SIX, shared_init=True)),
        Pool(
            "minilm-domains",
            MINILM,
            tuple(
                Member(name=f"part{n}", task="mr_sentiment", part=(n, 4), steps=150, seed=20 + n)
                for n in range(4)
            ),
        ),
        Pool("minilm-full", MINILM, _full()),
    )
}
"""By name. Those of minilm and minilm-ia3 that are shipped are not trained again."""
