"""The `kvsluice` command. Subcommands import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..errors import ConfigError, InvalidRecipe, KvsluiceError
from .cli_bench import register as register_bench
from .cli_calibrate import register as register_calibrate
from .cli_eval import register as register_eval
from .cli_fleet import register as register_fleet
from .cli_keys import register as register_keys
from .cli_loadtest import register as register_loadtest
from .cli_options import Service, connecting
from .cli_plan import register as register_plan
from .cli_sessions import register as register_sessions

if TYPE_CHECKING:
    from .config import ServeConfig

# help is plain: in a terminal of 80 columns the tables of rich cut the names of options off
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

EXIT_FAILED = 1

_CONFIG_HELP = (
    "YAML file, keys are the flags' names with _ for -, as in max_num_seqs: 8; the environment (KVSLUICE_MAX_NUM_SEQS) "
    "wins over it, flags win over both"
)
_SERVERS = "default: the server's"


def main() -> None:
    """Entry point. Errors of the tree end the command with one line that says what is wrong, and a status of 1."""
    try:
        app()
    except KvsluiceError as exc:
        print(f"kvsluice: {exc.message}", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvsluice {__version__}")
        raise typer.Exit


@app.callback()
def kvsluice(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and leave")
    ] = False,
) -> None:
    """Serve long prompts with prefill and decode apart and compressed KV caches."""


def _config_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one flag for every configuration key, named as the key."""
    from .config import ServeConfig, config_keys, metavar, shown_default

    parameters = [
        p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD
    ]
    for name in config_keys():
        field = ServeConfig.model_fields[name]
        # values are checked in one place, with the file's and the environment's
        kind: Any = bool | None if field.annotation is bool else str | None
        flag = name.replace("_", "-")
        spelled = f"--{flag}/--no-{flag}" if field.annotation is bool else f"--{flag}"
        help_text = f"{field.description}{shown_default(name)}"
        # flags that are not given stay None, which is not the default to show
        option = typer.Option(spelled, help=help_text, metavar=metavar(name), show_default=False)
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _check_start(config: ServeConfig) -> ServeConfig:
    """Refuse what no worker could start with, before anything is started. Returns the configuration that workers get.

    Raises:
        KvsluiceError: the model, its profile or the default recipe is at fault.
    """
    from ..compression.recipe import get_recipe
    from ..models.profiles import read_profile
    from ..models.tokenizer import load_tokenizer
    from .security import check_files

    check_files(config)
    path = Path(config.model).expanduser()
    if (os.sep in config.model or config.model.startswith((".", "~"))) and not path.exists():
        raise ConfigError(f"model: {config.model} does not exist")
    load_tokenizer(config.model)
    try:
        get_recipe(config.default_recipe)
    except InvalidRecipe as exc:
        raise ConfigError(f"default_recipe: {exc.problem}; allowed: {exc.allowed}") from exc
    if config.profile is not None:
        profile = Path(config.profile).expanduser()
        read_profile(profile)
        config = config.model_copy(update={"profile": str(profile.resolve())})
    if not path.exists():
        return config
    # workers run in another folder; clients go on using the name that was given
    return config.model_copy(update={"model": str(path.resolve()), "served_model_name": config.model_name})


@app.command()
@_config_flags
def serve(
    config: Annotated[Path | None, typer.Option(help=_CONFIG_HELP, metavar="FILE", show_default=False)] = None,
    **flags: Any,
) -> None:
    """Start the service on this machine and run until SIGTERM or Ctrl-C."""
    from .config import load_config
    from .serve import run

    sys.exit(run(_check_start(load_config(flags, os.environ, config))))


@app.command()
@connecting()
def generate(
    service: Service,
    prompt: Annotated[
        str | None, typer.Argument(help="the prompt, or the question about --file; `-` reads standard input")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="text file that the prompt begins with", metavar="FILE")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="send the prompt as a user's chat message")] = False,
    system: Annotated[str | None, typer.Option(help="system message; implies --chat")] = None,
    model: Annotated[str | None, typer.Option(help=f"served model's name; {_SERVERS}")] = None,
    recipe: Annotated[
        str | None, typer.Option(help=f"recipe or preset, such as exact, balanced, fast; {_SERVERS}")
    ] = None,
    slots: Annotated[str | None, typer.Option(help="JSON object of slots that replace the recipe's")] = None,
    max_tokens: Annotated[int | None, typer.Option(help=f"longest answer, in tokens; {_SERVERS}")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 = greedy; default: 1")] = None,
    top_p: Annotated[float | None, typer.Option(help="sample from this much probability; default: 1")] = None,
    top_k: Annotated[int | None, typer.Option(help="sample from so many tokens; default: 0 = all")] = None,
    min_p: Annotated[float | None, typer.Option(help="least share of the best token's probability; default: 0")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="default: 1 = none")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="default: 0 = none")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="default: 0 = none")] = None,
    seed: Annotated[int | None, typer.Option(help="default: drawn by the server")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="may be given several times")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="shortest answer, in tokens; default: 0")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="go on past the model's end of text")] = False,
    n: Annotated[int | None, typer.Option("-n", "--n", help="number of choices; default: 1")] = None,
    durability: Annotated[
        str | None, typer.Option(help=f"what is kept while it runs: none, handoff or tokens; {_SERVERS}")
    ] = None,
    session: Annotated[
        str | None, typer.Option(help="continue the conversation of this id, or begin it", metavar="ID")
    ] = None,
    session_turn: Annotated[int | None, typer.Option(help="which turn of it this has to be, from 1")] = None,
    timeout_s: Annotated[float | None, typer.Option(help=f"deadline; {_SERVERS}", metavar="SECONDS")] = None,
) -> None:
    """Generate text with a running service and print it as it comes."""
    from .terminal import parse_slots, read_prompt, stream_to_terminal

    text = read_prompt(prompt, file)
    messages = [{"role": "system", "content": system}] if system else []
    given = {
        "model": model,
        "recipe": recipe,
        "slots": parse_slots(slots),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "stop": stop or None,
        "min_tokens": min_tokens,
        "ignore_eos": ignore_eos or None,
        "n": n,
        "durability": durability,
        "session_id": session,
        "session_turn": session_turn,
        "timeout_s": timeout_s,
    }
    options = {name: value for name, value in given.items() if value is not None}
    prompt_or_chat = [*messages, {"role": "user", "content": text}] if chat or system else text
    sys.exit(stream_to_terminal(service, prompt_or_chat, options))


@app.command()
def recipes() -> None:
    """List the recipes and presets; docs/recipes.md says what each does, costs and loses."""
    from ..compression.recipe import PRESETS, recipe_names, recipe_summary

    lines = {name: recipe_summary(name) for name in recipe_names()}
    lines |= {name: f"= {meaning}" for name, meaning in PRESETS.items() if name != meaning}
    for name, summary in lines.items():
        print(f"{name:<{max(map(len, lines))}}  {summary}".rstrip())


@app.command()
@connecting()
def models(service: Service) -> None:
    """Show what a running service serves."""
    from ..client import Client

    with Client(service.address, timeout_s=30.0, **service.connecting) as client:
        info = client.model_info()
    print(f"{info.model}  context {info.max_model_len}  vocabulary {info.vocab_size}  fingerprint {info.fingerprint}")
    print(f"recipes: {', '.join(info.recipes)} (default {info.default_recipe})")


@app.command()
@connecting(optional=True)
def demo(
    service: Service | None,
    json: Annotated[Path | None, typer.Option(help="also write the results to this file")] = None,
) -> None:
    """Ask a real long document questions under several recipes and print what each costs."""
    from ..evals.demo import run_demo

    sys.exit(run_demo(service, json))


register_eval(app)
register_calibrate(app)
register_bench(app)
register_sessions(app)
register_fleet(app)
register_keys(app)
register_plan(app)
register_loadtest(app)


if __name__ == "__main__":
    main()
