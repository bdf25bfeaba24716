"""Who may import whom. The table of docs/architecture.md, as a test."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SERVICES_ROOT = "services.*"  # modules that lie directly in services/
WORKER = ("kernels", "models", "compression", "kvstore", "protos", "services.metrics", SERVICES_ROOT)
SERVICES_BASE = ("protos", "kvstore", SERVICES_ROOT)

# The first entry whose left side covers a module counts. Everything may import `errors`, and itself.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "protos": (),
    "kernels": (),
    "kvstore": ("protos",),
    "compression": ("kernels",),
    "models": ("kernels",),
    "client": ("protos", SERVICES_ROOT),
    "loadtest": ("client",),
    "evals": (*WORKER, "services.prefill", "services.decode", "client"),
    "benchmarks": (*WORKER, "services.prefill", "services.decode", "client", "evals"),
    **dict.fromkeys(
        ("benchmarks.overload", "benchmarks.overload_service", "benchmarks.overload_simulated"),
        ("protos", "compression.recipe", "kvstore", "client", "evals", "benchmarks", "services.gateway", SERVICES_ROOT),
    ),
    "services.cli": ("",),
    **dict.fromkeys(("services.cli_calibrate", "services.cli_eval"), ("evals", "services.cli_options")),
    "services.cli_bench": ("benchmarks", "services.cli_options"),
    "services.cli_plan": ("benchmarks", "models"),
    "services.cli_loadtest": ("loadtest", "services.cli_options", "services.connection", "evals.report"),
    "services.terminal": ("client", SERVICES_ROOT),
    "services.cluster": ("services.fleet", "services.gateway.membership", SERVICES_ROOT),
    "services.one_machine": ("services.fleet", SERVICES_ROOT),
    "services.fleet_commands": ("services.fleet", SERVICES_ROOT),
    "services.actors": (*WORKER, "services.prefill", "services.decode", "services.gateway", "services.fleet"),
    "services.fleet": ("services.gateway.membership", "services.settings", SERVICES_ROOT),
    "services.ranks": (*WORKER, "services.prefill", "services.decode"),
    "services.settings": ("kvstore",),
    "services.metrics": ("services.settings", *SERVICES_BASE),
    "services.config": ("services.settings", "kvstore"),
    "services.prefill": WORKER,
    "services.decode": WORKER,
    "services.gateway": (
        "models.tokenizer",
        "compression.recipe",
        "compression.shared_layers",
        "services.metrics",
        *SERVICES_BASE,
    ),
    SERVICES_ROOT: (
        "compression.recipe",
        "compression.interfaces",
        "services.metrics",
        "services.settings",
        *SERVICES_BASE,
    ),
    "": ("client",),
}
NOT_AT_IMPORT = {"ray", "pydantic", "redis", "tenacity", "fastapi"}
# the Redis store itself; only kvstore/opening.py leads to these files, when such a store is opened
REDIS_FILES = {"kvstore/guard.py", "kvstore/redis.py", "kvstore/redis_links.py"}
BARE = ("kernels", "models", "compression", "kvstore", "benchmarks")
RAY_FILES = {"services/actors.py", "services/cluster.py", "services/ray_metrics.py"}
TORCH_FREE_FILES = (
    "kvstore/",
    "services/gateway/",
    "models/tokenizer.py",
    "compression/recipe.py",
    "compression/shared_layers.py",
    "compression/slots.py",
)


@dataclass(frozen=True)
class Import:
    """One import: `target` is a module of ours without `kvsluice.` when `ours`, else a third party's full name."""

    target: str
    ours: bool
    absolute: bool
    executed: bool  # runs when the module is imported: not inside a function, not only for type checkers
    line: int


def covers(pattern: str, module: str) -> bool:
    if pattern == "":
        return True
    if pattern == SERVICES_ROOT:
        return module.startswith("services.") and module.count(".") == 1 and module.split(".")[1] not in SUBSERVICES
    return module == pattern or module.startswith(pattern + ".")


SUBSERVICES = {"gateway", "fleet", "metrics", "prefill", "decode", "settings"}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def walk(node: ast.AST, executed: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, with whether it runs at import."""
    for child in ast.iter_child_nodes(node):
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(child)
        runs = executed and not deferred
        yield child, runs
        yield from walk(child, runs)


def resolve(source, node: ast.ImportFrom, name: str, root: Path) -> str:
    """The module of ours that `from <dots><module> import <name>` reaches."""
    package = source.module.split(".") if source.module else []
    if not source.is_package:
        package = package[:-1]
    base = package[: len(package) - (node.level - 1)] + (node.module.split(".") if node.module else [])
    deeper = root.joinpath(*base, name)
    if deeper.with_suffix(".py").is_file() or (deeper / "__init__.py").is_file():
        base = [*base, name]
    return ".".join(base)


def strip(name: str) -> tuple[str, bool]:
    ours = name == "kvsluice" or name.startswith("kvsluice.")
    return (name.removeprefix("kvsluice").lstrip(".") if ours else name), ours


def imports(source, root: Path) -> Iterator[Import]:
    for node, executed in walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                target, ours = strip(alias.name)
                yield Import(target, ours, True, executed, node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            for alias in node.names:
                target, ours = strip(node.module)
                name = f"{target}.{alias.name}".lstrip(".")
                deeper = root.joinpath(*name.split("."))
                if ours and (deeper.with_suffix(".py").is_file() or deeper.is_dir()):
                    target = name
                yield Import(target, ours, True, executed, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(resolve(source, node, alias.name, root), True, False, executed, node.lineno)


def allowed(module: str) -> tuple[str, tuple[str, ...]]:
    """The entry of the table that covers `module`, and what it may import."""
    order = sorted(MAY_IMPORT, key=len, reverse=True)
    own = next(pattern for pattern in order if covers(pattern, module))
    return own, MAY_IMPORT[own]


def test_every_folder_imports_only_what_the_table_allows(written_sources, root):
    wrong = []
    for source in written_sources:
        own, may = allowed(source.module)
        for found in imports(source, root):
            # the root package holds the version, and loads nothing when it is imported
            if not found.ours or found.target in ("errors", ""):
                continue
            if not any(covers(p, found.target) for p in ((own, *may) if own else may)):
                wrong.append(f"{source.path}:{found.line} imports {found.target}")
    assert not wrong, "\n".join(wrong)


def test_imports_inside_the_package_are_relative(written_sources, root):
    wrong = [
        f"{source.path}:{found.line} imports kvsluice.{found.target}"
        for source in written_sources
        for found in imports(source, root)
        if found.ours and found.absolute
    ]
    assert not wrong, "\n".join(wrong)


def third_party(sources, root):
    for source in sources:
        for found in imports(source, root):
            if not found.ours:
                yield source, found, found.target.split(".")[0]


def test_only_the_cluster_knows_ray(sources, root):
    wrong = {source.path for source, _, name in third_party(sources, root) if name == "ray"} - RAY_FILES
    assert wrong == set()


def test_only_the_http_door_knows_a_web_framework(sources, root):
    frameworks = {"fastapi", "starlette", "uvicorn", "h11"}
    wrong = {source.path for source, _, name in third_party(sources, root) if name in frameworks}
    assert {path for path in wrong if not path.startswith("services/gateway/http/")} == set()


def test_the_gateway_loads_the_http_door_when_it_opens_one(sources, root):
    wrong = [
        f"{source.path}:{found.line}"
        for source in sources
        for found in imports(source, root)
        if found.executed and covers("services.gateway.http", found.target)
        if not covers("services.gateway.http", source.module)
    ]
    assert wrong == []


def test_the_compute_parts_run_without_the_services_libraries(sources, root):
    wrong = [
        f"{source.path}:{found.line} imports {name}"
        for source, found, name in third_party(sources, root)
        if name in NOT_AT_IMPORT and found.executed and source.module.split(".")[0] in BARE
        if not (source.path in REDIS_FILES and name in {"redis", "tenacity"})
    ]
    assert not wrong, "\n".join(wrong)


def test_the_store_loads_its_client_library_when_one_is_opened(sources, root):
    """Every module outside the Redis store can be imported where neither redis nor tenacity is installed."""
    modules = [f"kvsluice.{s.module}" for s in sources if covers("kvstore", s.module) and s.path not in REDIS_FILES]
    assert "kvsluice.kvstore.opening" in modules
    program = (
        "import importlib, sys\nsys.modules.update(redis=None, tenacity=None)\n"
        f"for m in {modules!r}: importlib.import_module(m)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_torch_stays_out_of_the_files_that_must_do_without(sources, root):
    wrong = [
        f"{source.path}:{found.line}"
        for source, found, name in third_party(sources, root)
        if name == "torch" and found.executed and source.path.startswith(TORCH_FREE_FILES)
    ]
    assert not wrong, "\n".join(wrong)


def test_triton_is_imported_by_triton_files_only(sources, root):
    wrong = [
        s.path
        for s, _, name in third_party(sources, root)
        if name == "triton" and "triton" not in Path(s.path).with_suffix("").parts
    ]
    assert not wrong, "\n".join(wrong)


def test_the_error_tree_imports_nothing(sources, root):
    source = next(s for s in sources if s.path == "errors.py")
    assert {name for _, _, name in third_party([source], root)} <= {"__future__", "typing"}


@pytest.mark.parametrize(
    "area",
    ["services.gateway", "kvstore", "client", "compression.recipe", "compression.shared_layers", "models.tokenizer"],
)
def test_importing_leaves_torch_out(area, sources):
    """What the table cannot see: a package's __init__ or a library that pulls torch in."""
    modules = [f"kvsluice.{s.module}" for s in sources if covers(area, s.module)]
    program = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_no_module_called_kernels_is_exposed(root):
    """transformers probes for a library of that name; started from the root, ours must not answer."""
    program = "import importlib.util as u; print(u.find_spec('kernels'))"
    done = subprocess.run([sys.executable, "-P", "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
