"""`exact`: nothing is dropped, nothing is packed.

KV rows stay in the compute dtype, every row passes every layer and decode attends to all of them, so greedy
tokens equal those of a monolithic run. It is the oracle of the tests and what prompts run that are too short
for a recipe's rank, window or budget.

Deviations: none; sums may associate differently where attention merges the prompt's part with the generated part.
"""

from __future__ import annotations

from ..spec import Recipe

EXACT = Recipe(name="exact")
