"""The model card of a merge: what was merged and how, so that others can use it and make it again."""

import dataclasses

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.card_sections import common_licence, licences_section
from pcb_peft.adapters.source import Source
from pcb_peft.methods import get_method, list_methods
from pcb_peft.recipes.peft_aliases import method_of
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.recipes.steps import in_words
from pcb_peft.writing.model_card import PROJECT, Facts, code, link, public_name, table

RECIPE = "Recipe"


def merge_card(
    adapter: Adapter, recipe: Recipe, energy: float
) -> tuple[str, Facts, dict[str, str]]:
    """Return the title, the front matter and the sections of a merge's card.

    Args:
        adapter: The merged adapter.
        recipe: Its recipe.
        energy: Retained fraction of the merged energy.
    """
    sources = [source.path for source in recipe.adapters]
    rows = [
        (_linked(source), weight)
        for source, weight in zip(recipe.adapters, recipe.weights, strict=True)
    ]
    first = "\n\n".join(
        [
            _sentence(adapter, recipe),
            table(("adapter", "weight"), rows),
            table(("setting", "value"), _settings(recipe, energy)),
        ]
    )
    title = f"{len(rows)} adapters merged with {recipe.method}"
    facts = Facts(
        base_model=adapter.base_model,
        models=sources,
        task_type=adapter.task_type,
        more=common_licence(adapter.licences),
    )
    sections = {"": first, **adapter.loading_sections(), **licences_section(adapter.licences)}
    sections[RECIPE] = recipe_section(recipe)
    return title, facts, sections


def _sentence(adapter: Adapter, recipe: Recipe) -> str:
    base = public_name(adapter.base_model)
    of_base = f" of {link(base)}" if base else ""
    paper = get_method(method_of(recipe.method)).paper if _is_known(recipe.method) else ""
    cited = f" ({_paper(paper)})" if paper not in ("", "none") else ""
    return (
        f"A merge of {len(recipe.adapters)} PEFT adapters{of_base}, made with [pcb_peft]({PROJECT}) by the method "
        f"[{recipe.method}]({PROJECT}/blob/main/docs/methods.md){cited}."
    )


def _is_known(method: str) -> bool:
    return method_of(method) in list_methods()


def _paper(paper: str) -> str:
    number = paper.removeprefix("arXiv:")
    return f"[{paper}](https://arxiv.org/abs/{number})" if number != paper else paper


def _linked(source: Source) -> str:
    public = public_name(source.path)
    return source.name if public is None else link(public)


def _settings(recipe: Recipe, energy: float) -> list[tuple[str, object]]:
    settings: dict[str, object] = {
        "method": recipe.method,
        "space": recipe.space,
        "scope": recipe.scope,
        **{
            when: in_words(steps)
            for when, steps in (("before", recipe.before), ("after", recipe.after))
            if steps
        },
        **{name: value for name, value in recipe.options.items() if value is not None},
        **({} if recipe.scale == 1 else {"scale": recipe.scale}),
        "retained energy": f"{energy:.4f}",
    }
    return list(settings.items())


def recipe_section(recipe: Recipe) -> str:
    """Return the section of a card that shows the recipe."""
    text = code("yaml", public_recipe(recipe).to_yaml())
    return f"`merge_recipe.yaml`, without local paths:\n\n{text}"


def public_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe without local paths: an adapter that is in no public place goes by its name."""
    return dataclasses.replace(
        recipe,
        adapters=tuple(map(_without_path, recipe.adapters)),
        statistics=tuple(map(_without_path, recipe.statistics)),
        base_model=public_name(recipe.base_model),
    )


def _without_path(source: Source) -> Source:
    return source if public_name(source.path) else dataclasses.replace(source, path=source.name)
