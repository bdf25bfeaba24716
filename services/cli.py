"""The `kvsluice` command. Subcommands import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, InvalidRecipe, KvsluiceError

if TYPE_CHECKING:
    from .config import ServeConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

EXIT_FAILED = 1


def main() -> None:
    """Entry point. Errors of the tree end the command with one line and a status other than 0."""
    try:
        app()
    except KvsluiceError as exc:
        print(f"kvsluice: {type(exc).__name__}: {exc.message}", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def _config_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one flag for every configuration key, named as the key."""
    from .config import ServeConfig

    parameters = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name, field in ServeConfig.model_fields.items():
        # values are checked in one place, with the file's and the environment's
        kind: Any = bool | None if field.annotation is bool else str | None
        flag = name.replace("_", "-")
        spelled = f"--{flag}/--no-{flag}" if field.annotation is bool else f"--{flag}"
        option = typer.Option(spelled, help=field.description, show_default=str(field.default))
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _check_start(config: ServeConfig) -> ServeConfig:
    """Refuse what no worker could start with, before anything is started. Returns the configuration that workers get.

    Raises:
        KvsluiceError: the model or the default recipe is at fault.
    """
    from ..compression.recipe import get_recipe
    from ..models.tokenizer import load_tokenizer

    load_tokenizer(config.model)
    try:
        get_recipe(config.default_recipe)
    except InvalidRecipe as exc:
        raise ConfigError(f"default_recipe: {exc.problem}; allowed: {exc.allowed}") from exc
    path = Path(config.model)
    if not path.exists():
        return config
    # workers run in another folder; clients go on using the name that was given
    return config.model_copy(update={"model": str(path.resolve()), "served_model_name": config.model_name})


@app.command()
@_config_flags
def serve(
    config: Annotated[Path | None, typer.Option(help="YAML file; the environment and flags win over it")] = None,
    **flags: Any,
) -> None:
    """Start the service on this machine and run until SIGTERM or Ctrl-C."""
    from .config import load_config
    from .serve import run

    sys.exit(run(_check_start(load_config(flags, os.environ, config))))


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="the prompt; `-` reads standard input")] = None,
    file: Annotated[Path | None, typer.Option(help="read the prompt from a file")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="send the prompt as a user's chat message")] = False,
    system: Annotated[str | None, typer.Option(help="system message; implies --chat")] = None,
    address: Annotated[str, typer.Option(help="host:port of the service")] = "127.0.0.1:8033",
    model: Annotated[str | None, typer.Option(help="served model's name")] = None,
    recipe: Annotated[str | None, typer.Option(help="recipe or preset, such as exact, balanced, fast")] = None,
    slots: Annotated[str | None, typer.Option(help="JSON object of slots that replace the recipe's")] = None,
    max_tokens: Annotated[int | None, typer.Option()] = None,
    temperature: Annotated[float | None, typer.Option(help="0 = greedy")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    presence_penalty: Annotated[float | None, typer.Option()] = None,
    frequency_penalty: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    stop: Annotated[list[str] | None, typer.Option(help="may be given several times")] = None,
    min_tokens: Annotated[int | None, typer.Option()] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos")] = False,
    n: Annotated[int | None, typer.Option("-n", "--n", help="number of choices")] = None,
    timeout_s: Annotated[float | None, typer.Option(help="deadline in seconds")] = None,
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
        "timeout_s": timeout_s,
    }
    options = {name: value for name, value in given.items() if value is not None}
    prompt_or_chat = [*messages, {"role": "user", "content": text}] if chat or system else text
    sys.exit(stream_to_terminal(address, prompt_or_chat, options))


@app.command()
def recipes() -> None:
    """List the recipes and presets."""
    from ..compression.recipe import PRESETS, recipe_names

    for name in recipe_names():
        print(name)
    for name, meaning in PRESETS.items():
        if name != meaning:
            print(f"{name} (= {meaning})")


@app.command()
def models(address: Annotated[str, typer.Option(help="host:port of the service")] = "127.0.0.1:8033") -> None:
    """Show what a running service serves."""
    from ..client import Client

    with Client(address, timeout_s=30.0) as client:
        info = client.model_info()
    print(f"{info.model}  context {info.max_model_len}  vocabulary {info.vocab_size}  fingerprint {info.fingerprint}")
    print(f"recipes: {', '.join(info.recipes)} (default {info.default_recipe})")


@app.command()
def demo(
    address: Annotated[str | None, typer.Option(help="host:port of a running service; else one is started")] = None,
    json: Annotated[Path | None, typer.Option(help="also write the results to this file")] = None,
) -> None:
    """Ask a real long document questions under several recipes and print what each costs."""
    from ..evals.demo import run_demo

    sys.exit(run_demo(address, json))


if __name__ == "__main__":
    main()
