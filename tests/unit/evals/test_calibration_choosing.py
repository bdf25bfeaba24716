"""What a calibration tries, what its budgets leave, who goes on and who wins."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvsluice.compression.recipe import fill, get_recipe, recipe_names
from kvsluice.compression.sizes import encoded_nbytes
from kvsluice.errors import InvalidRequest
from kvsluice.evals.calibration.candidates import (
    MOST_LAYERS,
    Candidate,
    Costs,
    Subject,
    allowed,
    caches,
    key_codec,
    open_numbers,
    propagations,
    require_some,
)
from kvsluice.evals.calibration.choosing import choose, finalists, ranked
from kvsluice.evals.calibration.options import OPTIONS, parse_calibration
from kvsluice.evals.results import Cell
from kvsluice.models.config import SHAPES
from kvsluice.models.profiles import load_profile
from kvsluice.services.model_shape import model_shape
from kvsluice.services.prefill.flops import prompt_flops

CONFIG = SHAPES["smollm2-135m"]
SHAPE = replace(model_shape(CONFIG), max_position_embeddings=32768)
GRID = parse_calibration({}).grid


def subject(recipe: str = "sluice", **given) -> Subject:
    made = Subject(CONFIG, SHAPE, load_profile("smollm2-135m-longctx", SHAPE), get_recipe(recipe), (8192,), 0.75, 0.25)
    return replace(made, **given)


def test_what_recipes_leave_open() -> None:
    found = {name: open_numbers(get_recipe(name)) for name in recipe_names()}
    assert {name: numbers for name, numbers in found.items() if numbers} == {
        "fastkv": ("layer", "rate", "window"),
        "sluice": ("layer", "rate", "window", "recall", "key_codec", "chunk", "outliers"),
        "sluice-full": ("key_codec", "chunk", "outliers"),
    }


def test_budgets_are_what_the_engine_counts_and_the_layout_says() -> None:
    candidates = propagations(subject(), GRID)
    exact = fill(get_recipe("exact"), SHAPE, {})
    whole = prompt_flops(CONFIG, SHAPE, exact, 8192).total
    for one in candidates:
        assert one.recipe is not None and one.costs is not None, one.refused
        share = prompt_flops(CONFIG, SHAPE, one.recipe, 8192).total / whole
        assert one.costs.prefill == pytest.approx(share)
        assert one.costs.shipped == encoded_nbytes(one.recipe, SHAPE, 8192, 2) / SHAPE.bf16_kv_bytes(8192)
        assert (one.refused is None) == (share <= 0.75), "bytes can be made up for by the cache"
    assert any("takes 0." in one.refused for one in candidates if one.refused)


def test_layers_are_thinned_to_those_that_matter() -> None:
    candidates = propagations(subject(max_prefill=0.9), GRID)
    for rate in GRID.rates:
        own = [one for one in candidates if (one.choice["tsp_rate"], one.choice["tsp_window"]) == (rate, 64)]
        layers = sorted(one.choice["tsp_layer"] for one in allowed(own))
        refused = [one.choice["tsp_layer"] for one in own if one.refused]
        assert len(layers) == MOST_LAYERS and layers[0] == 0
        assert max(layers) == min([*refused, 29]) - 1, "the deepest that the budget allows"
    asked = propagations(subject(), replace(GRID, layers=(3, 9), rates=(0.2,), windows=(64,)))
    assert [one.choice["tsp_layer"] for one in asked] == [3, 9]


def test_of_several_contexts_the_most_expensive_counts() -> None:
    one, both = (subject(contexts=contexts).present().costs for contexts in ((16384,), (2048, 16384)))
    short = subject(contexts=(2048,)).present().costs
    assert both == Costs(*(max(getattr(one, n), getattr(short, n)) for n in ("prefill", "shipped", "held")))


def test_what_cannot_be_is_refused_with_its_reason() -> None:
    found = subject().candidate("a", {"tsp_window": 32})
    assert found.recipe is None and "at least 64" in found.refused
    short = subject(contexts=(512,)).present()
    assert short.refused.startswith("would run exact: 512 tokens")
    with pytest.raises(InvalidRequest, match=r"no way to select rows is left: T0.* comes nearest and takes 0"):
        require_some(propagations(subject(max_prefill=0.05), GRID), "way to select rows")


def test_more_bytes_than_the_profile_has_are_no_reason_against_rows() -> None:
    wide = load_profile("smollm2-135m-longctx", SHAPE) | {"key_codec": key_codec("int8", SHAPE)}
    assert subject(profile=wide).present().refused.startswith("ships 0.3")
    assert len(allowed(propagations(subject(profile=wide), GRID))) == len(allowed(propagations(subject(), GRID)))


def test_rows_for_which_no_cache_is_left_are_refused() -> None:
    """Whatever the profile has now: rows are packed by one of the caches to choose from."""
    assert subject().present().refused is None
    grid = replace(GRID, keys=("int8",), layers=(3, 18), rates=(0.2,), windows=(64,))
    shallow, deep = propagations(subject(), grid)
    assert shallow.refused is None
    assert deep.refused.startswith("with int8") and "ships 0." in deep.refused
    with pytest.raises(InvalidRequest, match=r"no way to select rows is left: .* comes nearest and with "):
        require_some(propagations(subject(max_shipped=0.05), grid), "way to select rows")


def test_caches_keep_within_the_bytes_under_the_rows_that_were_chosen() -> None:
    rows = {"tsp_layer": 19, "tsp_rate": 0.2, "tsp_window": 64}
    found = caches(subject(), GRID, rows)
    assert all(one.choice.items() >= rows.items() for one in found)
    left = allowed(found)
    assert 0 < len(left) < len(found) == len(GRID.keys) * len(GRID.chunks) * len(GRID.outliers)
    assert all(one.costs.shipped <= 0.25 for one in left)
    assert {"int2", "int4"} <= {one.label.split("-")[0] for one in left}
    assert all(one.refused.startswith("ships") for one in found if one.label.startswith("int8"))
    assert caches(subject("fastkv"), GRID, {}) == [] and propagations(subject("sluice-full"), GRID) == []


def candidate(label: str, together: float = 0.5, **choice) -> Candidate:
    return Candidate(label, choice, get_recipe("exact"), Costs(together, 0.0, 0.0))


def test_equal_errors_are_ranked_by_cost() -> None:
    three = [candidate("dear", 0.9), candidate("cheap", 0.4), candidate("good", 0.8), candidate("not measured")]
    order = ranked(three, {"dear": 0.2, "cheap": 0.2, "good": 0.1})
    assert [one.label for one in order] == ["good", "cheap", "dear"]


def test_finalists_are_the_best_of_both_stages_and_those_next_to_it() -> None:
    made = subject(max_shipped=0.4)
    rows = [
        made.candidate(f"T{layer}", {"tsp_layer": layer, "tsp_rate": 0.2, "tsp_window": 64}) for layer in (17, 16, 15)
    ]
    packed = [
        made.candidate(keys, {**rows[0].choice, "key_codec": key_codec(keys, SHAPE), "chunk": 4, "outliers": 0})
        for keys in ("int8", "rank-0.5", "int2")
    ]
    found = finalists(made, rows, packed, 4)
    told = [(one.choice["tsp_layer"], one.label.split("-")[3]) for one in found]
    assert told == [(17, "int8"), (17, "rank96x8"), (16, "int8"), (17, "int2"), (19, "int4")], "as it is now comes last"
    assert finalists(made, rows, packed, 1)[0].label.startswith("T17-r0.2-w64-int8")
    assert len(finalists(subject(), [], [subject().present()], 4)) == 1, "what is the same runs once"


def test_numbers_beyond_a_budget_are_compared_with_and_not_chosen() -> None:
    narrow = subject(max_prefill=0.6)
    rows = [narrow.candidate("T9", {"tsp_layer": 9, "tsp_rate": 0.2, "tsp_window": 64})]
    found = finalists(narrow, rows, [], 4)
    assert [one.choice["tsp_layer"] for one in found] == [9, 19]
    assert [one.choice["tsp_layer"] for one in allowed(found)] == [9]
    right, wrong = [1.0] * 10, [0.0] * 10
    verdict = choose(cells(exact=right, now=right, own=wrong), {"own": Costs(0.5, 0.2, 0.2)}, ["exact", "now"])
    assert (verdict.best, verdict.chosen, verdict.tied) == ("own", "own", ("own",))
    assert verdict.behind["now"].mean == verdict.behind["exact"].mean == -1.0


def cells(**scores: list[float]) -> list[Cell]:
    """One task, at two contexts, of which the second is like the first."""
    return [
        Cell(label, context, "vt", None, tuple(own), 900.0, 1.0, 2.0, 4.0, 0)
        for label, own in scores.items()
        for context in (1024, 2048)
    ]


def test_the_best_wins_where_it_is_told_apart() -> None:
    found = choose(
        cells(exact=[1.0] * 20, dear=[1.0] * 18 + [0.0] * 2, cheap=[0.0] * 20),
        {"dear": Costs(0.7, 0.2, 0.3), "cheap": Costs(0.5, 0.1, 0.1)},
    )
    assert (found.best, found.chosen, found.tied) == ("dear", "dear", ("dear",))
    assert found.behind["cheap"].low > 0.5 and found.behind["dear"].mean == 0.0


def test_among_those_that_are_not_told_apart_the_cheapest_wins() -> None:
    scores = {"dear": [1.0] * 10 + [0.0] * 10, "cheap": [1.0] * 9 + [0.0] * 11, "bad": [0.0] * 20}
    costs = {"dear": Costs(0.7, 0.2, 0.3), "cheap": Costs(0.6, 0.2, 0.3), "bad": Costs(0.1, 0.1, 0.1)}
    found = choose(cells(**scores), costs)
    assert (found.best, found.chosen) == ("dear", "cheap")
    assert found.tied == ("dear", "cheap"), "bad is cheapest, and told apart"
    same = {"dear": Costs(0.6, 0.2, 0.4), "cheap": Costs(0.6, 0.2, 0.3)}
    assert choose(cells(dear=scores["dear"], cheap=scores["cheap"]), same).chosen == "cheap", "held bytes decide then"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"recipe": "exact"}, "--recipe: exact leaves no number to a model's profile; allowed: fastkv, sluice, "),
        ({"recipe": "balance"}, "--recipe: unknown recipe 'balance'"),
        ({"recipe": "fast", "keys": "int4"}, "--keys: is of no use to fastkv"),
        ({"recipe": "sluice-full", "layers": "3"}, "--layers: is of no use to sluice-full"),
        ({"max_prefill_flops": "0"}, "--max-prefill-flops: '0'; allowed: a number above 0"),
        ({"max_kv_bytes": "nan"}, "--max-kv-bytes: 'nan'"),
        ({"keys": "int3"}, "--keys: 'int3'; allowed: int2, int4, int8, rank-SHARE"),
        ({"keys": "int4,int4"}, "--keys: 'int4,int4'; allowed: values that differ"),
        ({"chunks": "3"}, "--chunks: '3'; allowed: 1, 2, 4, 8, 16"),
        ({"rates": "0,0.2"}, "--rates: 0; allowed: numbers above 0"),
        ({"windows": "0"}, "--windows: '0'; allowed: a whole number from 1 to 512"),
        ({"context": "12"}, "--context: '12'; allowed: a whole number from 256"),
        ({"finalists": "0"}, "--finalists: '0'; allowed: a whole number from 1"),
        ({"device": "tpu"}, "--device: 'tpu'; allowed: cpu, cuda"),
        ({"out": "profile.txt"}, "--out: 'profile.txt'; allowed: a file whose name ends in .json"),
        ({"plot": "a.png"}, "--plot: 'a.png'; allowed: a file whose name ends in .svg"),
        ({"out": "a.json", "json": "./a.json"}, "--out: a.json is what --json writes; allowed: another file"),
        ({"out": "a.finalists.json", "json": "a.json"}, "--out: a.finalists.json is what --json writes"),
    ],
)
def test_bad_options_are_refused_by_name(given, said) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_calibration(given)
    assert said in refused.value.message


def test_defaults_are_what_the_help_says() -> None:
    options = parse_calibration({"recipe": "balanced"})
    assert (options.recipe.name, options.max_prefill, options.max_shipped) == ("sluice", 0.7, 0.25)
    assert (options.contexts, options.evaluation.samples, options.out.name) == (
        (8192,),
        10,
        "smollm2-135m-longctx.profile.json",
    )
    assert parse_calibration({"recipe": "sluice-full"}).max_prefill > 1, "every row goes on there"
    assert len({one.name for one in OPTIONS}) == len(OPTIONS)
    assert parse_calibration({"model": "/models/some.gguf"}).out.name == "some.profile.json"
