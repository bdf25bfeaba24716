"""Several processes that hold one model together say what one process says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from kvsluice.errors import ConfigError
from kvsluice.models.parallel import check_size, cut
from kvsluice.tests.integration.engines import ranks


@pytest.fixture(scope="module")
def outcome() -> dict:
    command = [sys.executable, "-P", "-m", "kvsluice.tests.integration.engines.ranks", "0", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("recipe", ranks.RECIPES)
def test_two_ranks_prefill_and_decode_as_one_process_does(outcome, recipe) -> None:
    found = outcome["recipes"][recipe]
    assert all(found["first_tokens_equal"])
    # frames know nothing of ranks: the same tensors, but for what sums in another order round to
    assert found["differing_share"] < 0.005
    assert found["tokens"] == found["expected"]


@pytest.mark.parametrize("recipe", ranks.RECIPES)
def test_rows_of_all_ranks_are_kept_and_go_on(outcome, recipe) -> None:
    found = outcome["recipes"][recipe]
    assert found["kept_shape"][1:] == [4, 16], "of all heads"
    assert found["continued"]


def test_a_rank_is_of_the_whole_model(outcome) -> None:
    assert outcome["fingerprint"]


def test_ranks_that_do_not_divide_the_model_are_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: 3 does not divide .* 8 heads; allowed: 1, 2, 4"):
        check_size(ranks.config(), 3)


def test_a_part_is_cut_along_one_axis() -> None:
    x = torch.arange(12).view(4, 3)
    assert cut(x, (2, 3), 1).tolist() == [[6, 7, 8], [9, 10, 11]]
    assert cut(x, (4, 3), 1) is x
    with pytest.raises(ValueError, match="one axis"):
        cut(x, (2, 1), 0)
