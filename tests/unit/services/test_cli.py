"""What the command line says without a service: help, version, and what it refuses."""

from __future__ import annotations

import io
import sys

import pytest

from kvsluice import __version__
from kvsluice.compression.recipe import PRESETS, recipe_names
from kvsluice.errors import ConfigError, WorkerLost
from kvsluice.services import cli, terminal
from kvsluice.services.api import Chunk
from kvsluice.services.config import ServeConfig, config_keys, load_config
from kvsluice.tests.command_line import help_options


@pytest.fixture
def kvsluice(monkeypatch, capsys):
    """Runs the command as its entry point does; gives status, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvsluice", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("generate", "hi", "--address", "127.0.0.1:1"),
            'kvsluice: cannot reach 127.0.0.1:1; is "kvsluice serve" running?\n',
        ),
        (("generate", "hi", "--address", "foo"), "kvsluice: address: 'foo' has no port; allowed: host:port"),
        (("sessions", "list", "--address", "127.0.0.1:1"), "kvsluice: cannot reach 127.0.0.1:1"),
        (("sessions", "delete", "tea", "--address", "foo"), "kvsluice: address: 'foo' has no port"),
        (("models", "--address", "127.0.0.1:0"), "kvsluice: address: '127.0.0.1:0' has no port"),
        (("generate", "--file", "/no/such/file"), "kvsluice: --file: cannot read /no/such/file: No such file"),
        (("generate", "hi", "--slots", "["), "kvsluice: --slots: is not JSON"),
        (("serve", "--model", "/no/such/model"), "kvsluice: model: /no/such/model does not exist\n"),
        (("serve", "--profile", "/no/such/profile"), "kvsluice: profile: cannot read profile: No such file"),
        (
            ("calibrate", "--recipe", "kivi"),
            "kvsluice: --recipe: kivi leaves no number to a model's profile",
        ),
        (("serve", "--config", "/no/such/file"), "kvsluice: config: cannot read /no/such/file"),
    ],
)
def test_what_cannot_work_ends_with_one_line_that_says_why(kvsluice, arguments, said):
    code, out, err = kvsluice(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith(said)
    assert err.count("\n") == 1


def test_workers_get_a_profile_by_a_path_that_holds_in_other_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.json").write_text('{"tsp_layer": 12}')
    checked = cli._check_start(load_config({"profile": "own.json"}))
    assert checked.profile == str(tmp_path / "own.json")
    (tmp_path / "own.json").write_text('{"tsp_depth": 12}')
    with pytest.raises(ConfigError, match=r"profile: unknown key 'tsp_depth'; allowed: .*own\.json"):
        cli._check_start(load_config({"profile": "own.json"}))


def test_an_unknown_model_lists_each_name_once(kvsluice):
    _, _, err = kvsluice("serve", "--model", "nope")
    names = err.replace(",", " ").replace("(", " ").replace(")", " ").split()
    assert names.count("smollm2-135m") == 1


def test_the_version(kvsluice):
    assert kvsluice("--version") == (0, f"kvsluice {__version__}\n", "")


def test_every_recipe_is_listed_with_what_it_does(kvsluice):
    status, said, _ = kvsluice("recipes")
    assert status == 0
    lines = dict(line.split(maxsplit=1) for line in said.splitlines())  # a name alone would be refused
    assert lines.keys() == {*recipe_names(), *PRESETS}
    assert lines["balanced"] == "= sluice"
    assert all(len(line) <= 80 for line in said.splitlines()), "it fits a terminal"


def test_the_help_of_serve_says_of_every_setting_what_it_takes_and_what_holds_without_it():
    flags = help_options("serve")
    for name in config_keys():
        field = ServeConfig.model_fields[name]
        text = flags["--" + name.replace("_", "-")]
        assert "default: " in text, name
        assert "None" not in text
        assert "<str>" not in text
        assert field.description
    assert flags["--port"].startswith("INTEGER ")
    assert flags["--grace-s"].startswith("SECONDS ")
    assert flags["--max-message-bytes"].startswith("BYTES ")
    assert flags["--role"].startswith("split|both ")
    assert "YAML file" in flags["--config"]


def test_the_help_of_generate_says_what_holds_without_an_option():
    shown = help_options("generate")
    for flag in ("--max-tokens", "--temperature", "--top-p", "--recipe", "--seed", "--timeout-s"):
        assert "default: " in shown[flag]


def test_a_prompt_beside_a_file_is_the_question_about_it(tmp_path, monkeypatch):
    file = tmp_path / "long.txt"
    file.write_text("A document.\n")
    assert terminal.read_prompt("What is it?", file) == "A document.\n\nWhat is it?"
    assert terminal.read_prompt(None, file) == "A document.\n"
    assert terminal.read_prompt("What is it?", None) == "What is it?"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?"))
    assert terminal.read_prompt("-", file) == "A document.\n\nWho?"


@pytest.mark.parametrize("end", [WorkerLost("gone"), KeyboardInterrupt()])
@pytest.mark.parametrize(("texts", "shown"), [(["A ", "part"], "A part\n"), ([""], ""), ([], "")])
def test_what_follows_a_partial_answer_starts_a_new_line(capsys, end, texts, shown):
    def stream():
        for text in texts:
            yield Chunk(0, text, (), (), None)
        raise end

    with pytest.raises(type(end)):
        terminal._print_text(stream())
    assert capsys.readouterr().out == shown
