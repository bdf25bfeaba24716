"""From files of results to tables, plots and pages: what they say, and that pages say it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from kvsluice.compression.recipe import PRESETS, Recipe, fill, get_recipe, recipe_names
from kvsluice.evals import recipe_slots, recipe_tables, simulation
from kvsluice.evals.pages import block
from kvsluice.evals.recorded import Run
from kvsluice.evals.results import Agreement, Cell, EvalResults, EvaluatedModel, EvaluatedRecipe, save
from kvsluice.evals.statistics import summarize
from kvsluice.models.checkpoint import DEFAULT_MODEL
from kvsluice.models.profiles import load_profile

ROOT = Path(__file__).resolve().parents[3]
PAGES = ROOT / "docs" / "recipes"
HEADINGS = ("What it does", "What it costs", "What it loses", "When to use it", "Source", "Where ours departs")
WHERE = {"commit": "abc123", "hardware": {"cpu": "a CPU", "cores": 2}, "python": "3.11", "libraries": {"torch": "2"}}


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_report", ROOT / "scripts" / "recipe_report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


report = load_script()


def filled_recipe(recipe: Recipe) -> Recipe:
    shape = recipe_slots.default_shape()
    return fill(recipe, shape, load_profile(DEFAULT_MODEL, shape))


def evaluated(recipe: Recipe) -> EvaluatedRecipe:
    slots = json.loads(filled_recipe(recipe).to_json())
    return EvaluatedRecipe(slots.pop("name"), filled_recipe(recipe).fingerprint, slots)


def results(
    suite: str = "ruler", labels: tuple[str, ...] = ("exact", "snapkv", "kivi"), gpu: str = "", fallbacks: int = 0
) -> EvalResults:
    """Two contexts and two tasks (or texts, or depths); the recipe at place i is right 3 - i times of 4."""
    places = {"ruler": [("vt", None), ("niah_single_1", None)], "niah": [("needle", 0.0), ("needle", 1.0)]}
    cells = []
    for context in (8192, 16384):
        for task, depth in places.get(suite, [("bible", None), ("debian", None)]):
            for place, label in enumerate(labels):
                right = max(0, 3 - place)
                scores = tuple([1.0] * right + [0.0] * (4 - right))
                share = 1.0 if label == "exact" else 0.1 + 0.1 * place
                own = 0 if label == "exact" else fallbacks
                cells.append(Cell(label, context, task, depth, scores, 8000.0, 1e6 * share, 1.5e6 * share, 1e6, own))
    recipes = {}
    for label in labels:
        name, _, slots = simulation.VARIANTS.get(label, label).partition(":")
        recipes[label] = evaluated(get_recipe(name, slots))
    hardware = WHERE["hardware"] | ({"gpu": gpu} if gpu else {})
    settings = {"contexts": [8192, 16384], "samples": 4, "seed": 0, "tasks": ["vt"], "texts": {}}
    settings |= {"depths": [0.0, 0.5, 1.0]} if suite == "niah" else {}
    model = EvaluatedModel("a-model", "f" * 64, "a" * 64, "bfloat16")
    return EvalResults(
        WHERE | {"hardware": hardware}, suite, model, settings, recipes, tuple(cells), summarize(cells), None
    )


@pytest.fixture(scope="module")
def run() -> Run:
    return Run("ruler", results(gpu="A GPU 9000"))


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_table_of_averages_says_what_the_file_does(run):
    text = recipe_tables.averages(run)
    header, _, first, second, third = rows_of(text)[:5]
    assert header[1:5] == ["average [95 %]", "difference to `exact` [95 %]", "shipped", "held"]
    assert [row[0] for row in (first, second, third)] == ["`exact`", "`snapkv`", "`kivi`"]
    assert second[1].startswith("0.500 [") and second[2].startswith("−0.250 [")
    assert first[2] == "0.000 [0.000, 0.000]"
    assert second[3:5] == ["0.200", "0.300"]
    assert (header[5], second[5]) == ("prefill", ""), "not counted, and no model whose operations are known"
    assert second[6] == f"`{run.results.recipes['snapkv'].fingerprint[:8]}`"
    assert [line for line in text.splitlines() if line.startswith("**")] == ["**8,192 tokens**", "**16,384 tokens**"]


def test_every_table_says_where_it_comes_from(run):
    for text in (recipe_tables.averages(run), recipe_tables.overview(run)):
        assert (
            "`kvsluice eval --suite ruler --model a-model --recipe exact,snapkv,kivi --context 8192,16384 --samples 4 "
            "--seed 0 --task vt --device cuda --dtype bfloat16` on one A GPU 9000, in bfloat16, at commit "
            "abc123: 4 samples a task" in text
        )
        assert "fingerprint `ffffffff`, adapter `aaaaaaaa`" in text
    assert "--device cpu --dtype bfloat16` on 2 cores of a CPU, without a GPU" in recipe_tables.origin(
        Run("ruler", results())
    )
    niah = recipe_tables.origin(Run("niah", results("niah")))
    assert "--depth 0,0.5,1 --device" in niah and "--task" not in niah


def test_variants_are_given_as_they_were_measured():
    command = recipe_tables.origin(Run("ruler_variants", results(labels=("exact", "tsp-alone"))))
    assert "--recipe exact --variant 'tsp-alone=exact:{" in command
    assert simulation.VARIANTS["tsp-alone"] in command


def test_what_ran_exact_instead_and_what_transformers_says_is_told():
    short = replace(results(fallbacks=3), against=Agreement(samples=8, equal_scores=7, equal_tokens=6, differences=()))
    text = recipe_tables.averages(Run("ruler", short))
    assert "ran `exact`: `snapkv` on 6 of 8, `kivi` on 6 of 8." in text
    assert "on 7 of 8 samples, and the same tokens on 6." in text
    assert "ran `exact`" not in recipe_tables.averages(Run("ruler", results()))
    assert "16,384 tokens too short for the recipe, which ran `exact`: `snapkv` on 6 of 8" in recipe_tables.overview(
        Run("ruler", short)
    )
    page = recipe_tables.measured("kivi", [Run("ruler", short)])
    assert "`exact` ran: 6 of 8 samples at 8,192 tokens in `ruler.json`, 6 of 8 samples at 16,384" in page
    assert "`exact` ran" not in recipe_tables.measured("exact", [Run("ruler", short)])


def test_the_number_of_gpus_is_told():
    shared = results(gpu="A GPU 9000")
    shared.environment["hardware"]["gpus"] = 2
    assert "on 2 A GPU 9000, in bfloat16" in recipe_tables.origin(Run("ruler", shared))
    assert "4 samples a context and depth, the same" in recipe_tables.origin(Run("niah", results("niah")))


def test_the_readme_shows_the_main_file_or_none(tree, monkeypatch):
    save(tree / report.RESULTS / "ruler_float32.json", results(labels=("exact",)))
    assert make(tree, monkeypatch) == 0
    assert "Not measured yet." in (tree / report.README).read_text()
    assert "### In full precision, beside transformers" in (tree / report.LIBRARY).read_text()
    assert not (tree / report.IMAGES).exists(), "a single recipe makes no plot"


def test_plain_torch_stands_beside_the_main_file_and_nowhere_else(tree, monkeypatch):
    main = results()
    reference = replace(main, settings=dict(main.settings) | {"kernels": "reference"})
    save(tree / report.RESULTS / "ruler.json", main)
    save(tree / report.RESULTS / "ruler_reference.json", reference)
    assert make(tree, monkeypatch) == 0
    library = (tree / report.LIBRARY).read_text()
    assert rows_of(block(library, "reference", ""))[2:][0] == ["`exact`", "8,192", "8", "+0.000 [+0.000, +0.000]"]
    assert "--kernels reference" in block(library, "reference", "")
    assert "ruler_reference" not in block(library, "accuracy", "")
    assert "ruler_reference" not in (tree / "docs" / "recipes" / "snapkv.md").read_text()


def test_what_a_variant_changes_is_told():
    found = results(labels=("exact", "snapkv", "chunks-4"))
    assert rows_of(recipe_slots.variants_table(found))[2:] == [
        [
            "`chunks-4`",
            "`exact`",
            "`retrieval` `chunks` budget_rate = 0.06, budget_tokens = 256, chunk = 4, landmark_bits = 16, "
            "outliers = 0, select_every = 1; `window` local = 32",
        ]
    ]
    alone = results(labels=("chunks-4",))
    assert recipe_slots.variants_table(alone) == recipe_slots.variants_table(found), "the recipe need not have run"
    assert recipe_slots.variants_table(results()) == ""


def test_tasks_stand_beside_the_average(run):
    header, _, first, *_ = rows_of(recipe_tables.task_scores(run))
    assert header == ["recipe", "average", "vt", "single 1"]
    assert first == ["`exact`", "0.75", "0.75", "0.75"]


def test_less_is_better_in_nats():
    rows = rows_of(recipe_tables.perplexity(Run("ppl", results("ppl"))))
    assert rows[0][1] == "nats a token [95 %]"
    assert [row[0] for row in rows[2:5]] == ["`kivi`", "`snapkv`", "`exact`"]


def test_plots_show_every_recipe(run):
    drawn = recipe_tables.bytes_plot(run)
    needles = recipe_tables.needle_plot(Run("niah", results("niah")))
    for label in run.results.recipes:
        assert f">{label}<" in drawn and f">{label}<" in needles
    assert recipe_tables.bytes_plot(run) == drawn


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (recipe_tables.READ_ALL, {"exact", "kivi", "kivi-2bit", "fp8", "mikv", "lowrank", "xkv", "xkv-kv"}),
        (recipe_tables.READ_CHUNKS, {"shadowkv", "sluice-full"}),
        (recipe_tables.LEFT_OUT, {"fastkv", "sluice"}),
        (recipe_tables.DROPPED, {"snapkv", "pyramidkv", "streaming", "quantized-pruning"}),
    ],
)
def test_families_are_told_by_slots(family, names):
    found = {name for name in recipe_names() if recipe_tables.family_of(evaluated(get_recipe(name)).slots) == family}
    assert found == names


def peer_file(agrees: bool) -> dict:
    row = {"ours": 0.5, "kvpress": 0.52, "difference": -0.02, "low": -0.04, "high": -0.01, "samples": 8}
    row |= {"equal_tokens": 7, "equal_rows": 8, "agrees": agrees, "reason": None if agrees else "Near ties."}
    tasks = [row | {"comparison": "snapkv", "task": task} for task in ("average", "vt")]
    return {
        "environment": WHERE,
        "peer": {"name": "kvpress", "version": "0.5.5"},
        "model": {"dtype": "float32"},
        "recipes": {"snapkv": {"fingerprint": "e" * 32}},
        "settings": {"context": 8192, "samples": 4, "share": 0.1, "seed": 3, "tasks": ["vt"]},
        "summary": tasks,
    }


def test_a_peer_that_differs_is_told_with_its_reason():
    text = recipe_tables.peers("peer_kvpress", peer_file(agrees=False))
    (row,) = rows_of(text)[2:]
    assert row == ["`snapkv`", "0.500", "0.520", "−0.020 [−0.040, −0.010]", "no", "7 of 8", "8 of 8"]
    assert "- `snapkv` differs in the average, `vt`. Near ties." in text
    assert "kvpress 0.5.5" in text and "snapkv `eeeeeeee`" in text
    command = (
        "--comparison snapkv --task vt --context 8192 --samples 4 --share 0.1 --seed 3 --device cpu --dtype float32"
    )
    assert f"peer_kvpress {command}`" in text
    assert "differs" not in recipe_tables.peers("peer_kvpress", peer_file(agrees=True))


def test_variants_of_the_simulation_are_recipes():
    for variant in simulation.VARIANTS.values():
        name, _, slots = variant.partition(":")
        filled_recipe(get_recipe(name, slots))
    assert {line.label for line in simulation.SIMULATED} <= {*recipe_names(), *simulation.VARIANTS}


def test_wide_differences_to_the_simulation_stand_out_and_want_an_explanation():
    runs = [Run("ruler", results()), Run("ruler_variants", results(labels=("exact", "mikv", "tsp-alone")))]
    lines = {row[1]: row for row in rows_of(simulation.comparison(runs))}
    assert (lines["`exact`"][2], lines["`exact`"][4]) == ("0.92", "**−0.17**")
    assert lines["`tsp-alone`"][4] == "**−0.16**"
    assert lines["`chunks-8`"][3:] == ["not measured yet", ""]
    assert list(simulation.unexplained(runs, "")) == ["exact", "tsp-alone", "mikv"]
    assert list(simulation.unexplained(runs, "- **`exact`**: why.\n- **mikv**: why.")) == ["tsp-alone"]


def test_a_variant_with_other_slots_is_not_taken_for_the_simulations():
    other = results(labels=("exact", "tsp-alone"))
    other.recipes["tsp-alone"].slots["propagation"]["window"] = 64  # type: ignore[index]
    with pytest.raises(ValueError, match=r"tsp-alone ran with propagation\.window = 64, it stands for 8"):
        simulation.comparison([Run("ruler", other)])


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the pages, with no results."""
    shutil.copytree(PAGES, tmp_path / "docs" / "recipes")
    for name in (report.README, report.LIBRARY):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / report.RESULTS).mkdir(parents=True)
    return tmp_path


def make(root: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["recipe_report.py", *arguments])
    return report.main(root)


def explain(root: Path, labels: list[str]) -> None:
    page = root / report.LIBRARY
    lines = "\n".join(f"- **{label}**: because." for label in labels)
    page.write_text(
        re.sub(r"(?s)(<!-- explanations -->\n).*(<!-- end expl)", rf"\g<1>{lines}\n\g<2>", page.read_text())
    )


def test_files_of_ones_own_become_a_page_of_their_own(tree, tmp_path, monkeypatch, capsys):
    files = []
    for suite in ("ruler", "niah", "ppl"):
        files.append(tmp_path / f"my-{suite}.json")
        save(files[-1], results(suite))
    before = (tree / report.README).read_text()
    out = tmp_path / "out"
    assert make(tree, monkeypatch, "--results", *map(str, files), "--out", str(out)) == 0
    assert sorted(path.name for path in out.iterdir()) == ["my-niah.svg", "my-ruler.svg", "report.md"]
    page = (out / "report.md").read_text()
    assert "![scores against bytes shipped](./my-ruler.svg)" in page
    assert "## my-ppl.json" in page
    assert "`snapkv`" in page
    assert (tree / report.README).read_text() == before
    assert f"written: {out / 'report.md'}" in capsys.readouterr().out


def test_a_file_that_is_none_is_named_in_one_line(tree, tmp_path, monkeypatch, capsys):
    (tree / report.RESULTS / "ruler_x.json").write_text('{"broken": 1}')
    assert make(tree, monkeypatch) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "ruler_x.json holds something else" in said


def test_pages_without_results_say_so(tree, monkeypatch):
    assert make(tree, monkeypatch) == 0
    assert make(tree, monkeypatch, "--check") == 0
    library = (tree / report.LIBRARY).read_text()
    for name in ("accuracy", "tasks", "needles", "perplexity", "peers"):
        assert f"<!-- {name} -->\nNot measured yet.\n<!-- end {name} -->" in library
    assert not (tree / report.IMAGES).exists()


def test_results_fill_pages_and_images_and_check_tells_when_they_do_not(tree, monkeypatch, capsys):
    for suite in ("ruler", "niah", "ppl"):
        save(tree / report.RESULTS / f"{suite}.json", results(suite))
    (tree / report.RESULTS / "peer_kvpress.json").write_text(json.dumps(peer_file(agrees=True)))
    assert make(tree, monkeypatch, "--check") == 1
    assert make(tree, monkeypatch) == 0
    explain(tree, ["exact"])
    assert make(tree, monkeypatch, "--check") == 0
    assert "](docs/images/ruler.svg)" in (tree / report.README).read_text()
    assert "](images/niah.svg)" in (tree / report.LIBRARY).read_text()
    snapkv = (tree / "docs" / "recipes" / "snapkv.md").read_text()
    assert "| ruler (`ruler.json`) | 8,192 | 0.500 [" in snapkv
    assert "Not measured yet." in (tree / "docs" / "recipes" / "xkv.md").read_text()

    readme = tree / report.README
    readme.write_text(readme.read_text().replace("0.500 [", "0.900 ["))
    explain(tree, [])
    capsys.readouterr()
    assert make(tree, monkeypatch, "--check") == 1
    said = capsys.readouterr().out
    assert "README.md does not hold what benchmarks/results says" in said
    assert "does not explain the difference to the simulation for exact" in said


def test_images_of_results_that_are_gone_go_too(tree, monkeypatch, capsys):
    file = tree / report.RESULTS / "niah.json"
    save(file, results("niah"))
    make(tree, monkeypatch)
    file.unlink()
    assert make(tree, monkeypatch, "--check") == 1
    assert "docs/images/niah.svg shows results that are no more" in capsys.readouterr().out
    make(tree, monkeypatch)
    assert not (tree / report.IMAGES / "niah.svg").exists()


def test_the_pages_hold_what_results_and_recipes_say():
    assert report.faults(ROOT, report.wanted(ROOT)) == []


def test_every_recipe_has_a_page_and_every_page_a_recipe():
    library = (ROOT / report.LIBRARY).read_text()
    for kind in ("slots", "measured"):
        named = [
            name
            for page in sorted(PAGES.glob("*.md"))
            for name in re.findall(rf"^<!-- {kind} (\S+) -->$", page.read_text(), re.MULTILINE)
        ]
        assert sorted(named) == sorted(recipe_names())
    for page in PAGES.glob("*.md"):
        text = page.read_text()
        names = re.findall(r"^<!-- slots (\S+) -->$", text, re.MULTILINE)
        assert page.stem == names[0], "a page is called like its first recipe"
        assert text.startswith(f"# {', '.join(f'`{name}`' for name in names)}\n")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [*HEADINGS, "Slots", "Measured"]
        assert f"](recipes/{page.name})" in library
    assert all(f"preset `{preset}`" in library for preset, name in PRESETS.items() if preset != name)


def test_tables_of_slots_are_those_of_the_recipes():
    assert [
        "`evicted`",
        "`demote`",
        "balanced = false, group = 32, key_axis = token, key_bits = 4, value_bits = 4",
    ] in (rows_of(recipe_slots.slots_table("mikv")))
    assert "layer = from the model's profile or shape" in recipe_slots.slots_table("sluice")
    assert recipe_slots.shipped_shares("exact", [4096]) == ["1.000"]
    assert recipe_slots.shipped_shares("fp8", [4096]) == ["0.500"]
    assert recipe_slots.shipped_shares("kivi", [64]) == ["runs `exact`"]


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / report.README, ROOT / report.LIBRARY, *PAGES.glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} names {target}"


def test_pages_say_which_recipes_are_no_longer_those_that_ran():
    found = replace(results(), model=EvaluatedModel(DEFAULT_MODEL, "f" * 64, None, "bfloat16"))
    assert "Changed since" not in recipe_tables.averages(Run("ruler", found))
    other = replace(found.recipes["kivi"], fingerprint="0" * 64)
    run = Run("ruler", replace(found, recipes={**found.recipes, "kivi": other}))
    for text in (recipe_tables.averages(run), recipe_tables.overview(run)):
        assert "Changed since this was measured: `kivi`." in text
    assert "The recipe has changed since" in recipe_tables.measured("kivi", [run])
    assert "has changed" not in recipe_tables.measured("snapkv", [run])
    variant = Run("ruler", replace(run.results, recipes={**found.recipes, "mine": other}))
    assert "Changed since" not in recipe_tables.averages(variant)
