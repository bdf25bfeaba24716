"""Kept rows that are cut before they are put back."""

from __future__ import annotations

import pytest
import torch

from kvsluice.compression.interfaces import EncodedLayer, Part
from kvsluice.compression.saved_rows import first_rows
from kvsluice.errors import FrameMismatch


def layer(recalled: torch.Tensor) -> EncodedLayer:
    rows = torch.arange(6.0).view(6, 1, 1)
    more = {"recalled": recalled, "recalled_k": rows[:4], "recalled_v": rows[:4]}
    return EncodedLayer(3, {Part.TAIL: {"k": rows, "v": rows, **more}})


def test_what_later_rows_have_recalled_goes_with_them():
    (cut,) = first_rows([layer(torch.tensor([[8, 100], [16, 103]], dtype=torch.int32))], 100, 2)
    group = cut.tensors[Part.TAIL]
    assert {name: len(tensor) for name, tensor in group.items()} == {
        "k": 2, "v": 2, "recalled": 1, "recalled_k": 2, "recalled_v": 2,
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 2, 1)])
def test_what_does_not_name_rows_is_refused(shape):
    with pytest.raises(FrameMismatch, match="recalled rows"):
        first_rows([layer(torch.zeros(shape, dtype=torch.int32))], 100, 2)
