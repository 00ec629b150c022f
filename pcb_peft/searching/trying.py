"""Try a candidate: merge it, and measure that merge at several common weights."""

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.errors import OptionError, UnsupportedError
from pcb_peft.merging.engine import merge
from pcb_peft.merging.result import MergedAdapter
from pcb_peft.searching.climb import climb
from pcb_peft.searching.space import SearchSpace
from pcb_peft.searching.trials import Objective, Proposal, Trial
from pcb_peft.searching.validation import Validation


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trier:
    """The parts that trials need.

    Attributes:
        space: Makes recipes of candidates.
        adapters: All adapters.
        validation: Measures merges.
        objective: What a common weight is chosen by.
    """

    space: SearchSpace
    adapters: Sequence[Adapter]
    validation: Validation
    objective: Objective

    def __call__(self, proposal: Proposal) -> Trial:
        """Merge, and measure at the common weights around the one at which the merge responds as it should."""
        begun = time.perf_counter()
        kept: Mapping[float, Mapping[str, float]] = {}
        response, error = 0.0, ""
        try:
            merged = self._merged(proposal)
        # such as a method without such a space: another candidate may do
        except (OptionError, UnsupportedError) as refusal:
            error = str(refusal)
        else:
            response = self.validation.response(merged, self._members(proposal.members))
            kept = climb(
                lambda scale: self.validation.kept(merged.scaled(scale), proposal.members),
                self.objective,
                proposal.aim / response if proposal.aim and response > 0 else 1.0,
                proposal.best,
            )
        return Trial(
            number=proposal.number,
            candidate=proposal.candidate,
            members=proposal.members,
            step=proposal.step,
            kept=kept,
            response=response,
            seconds=time.perf_counter() - begun,
            error=error,
        )

    def _merged(self, proposal: Proposal) -> MergedAdapter:
        recipe = self.space.recipe_of(proposal.candidate, members=proposal.members)
        return merge(recipe, self._members(proposal.members), progress=False)

    def _members(self, names: Collection[str]) -> list[Adapter]:
        return [adapter for adapter in self.adapters if adapter.name in names]
