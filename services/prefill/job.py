"""What a prefill engine is asked for."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

from ...compression.recipe import Recipe
from ...models.sampling import SamplingParams


@dataclass(frozen=True)
class PrefillJob:
    """One prompt to run.

    Attributes:
        epoch: which attempt at the request this is.
        prompt_ids: at least one token id.
        recipe: resolved, no number open.
        resumed: first tokens were told by an earlier attempt: the layers are wanted whatever is drawn here.
        tenant: whose prompt it is; only prompts of one tenant share prefixes.
    """

    request_id: str
    epoch: int
    prompt_ids: tuple[int, ...]
    recipe: Recipe
    sampling: SamplingParams
    resumed: bool = False
    tenant: str = ""


def let_go(exc: BaseException) -> None:
    """Clear the frames that an error came through: whoever keeps the error, or its log record, keeps no tensors."""
    link: BaseException | None = exc
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
