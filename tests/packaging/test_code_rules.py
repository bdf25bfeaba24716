"""Rules that keep the code safe to run and easy to read."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
LONG_FILES: dict[str, str] = {}  # path -> why it may be longer
LONG_FUNCTIONS = {  # path::name -> why it may be longer
    "services/cli.py::generate": "a line for every option of the command, and nothing else",
}

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
}
FORGOTTEN = re.compile(r"(#|//).*\b(TODO|FIXME|XXX)\b")
NAME_OF_IMPORT = {
    "pyyaml": "yaml",
    "protobuf": "google",
    "grpcio": "grpc",
    "grpcio-health-checking": "grpc_health",
    "grpcio-reflection": "grpc_reflection",
    "opentelemetry-sdk": "opentelemetry",
    "opentelemetry-exporter-otlp-proto-grpc": "opentelemetry",
    "nvidia-ml-py": "pynvml",
}


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def unsafe_uses(source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        where = f"{source.path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{where} imports {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.Call):
            if called(node) in UNSAFE_CALLS:
                yield f"{where} calls {called(node)}"
            for word in node.keywords:
                if word.arg == "shell" and ast.unparse(word.value) != "False":
                    yield f"{where} runs a shell"


def test_nothing_executes_data(sources):
    assert [use for source in sources for use in unsafe_uses(source)] == []


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")


def test_files_are_short(written_sources):
    long = {s.path: s.num_lines for s in written_sources if s.num_lines > MAX_FILE_LINES and s.path not in LONG_FILES}
    assert long == {}


def test_functions_are_short(written_sources):
    long = {}
    for source in written_sources:
        for name, node in functions(source.tree):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES and f"{source.path}::{name}" not in LONG_FUNCTIONS:
                long[f"{source.path}::{name}"] = lines
    assert long == {}


def test_exceptions_to_the_length_rules_are_still_needed(written_sources):
    sizes = {s.path: s.num_lines for s in written_sources}
    names = {f"{s.path}::{n}": f for s in written_sources for n, f in functions(s.tree)}
    assert [path for path in LONG_FILES if sizes.get(path, 0) <= MAX_FILE_LINES] == []
    stale = [n for n in LONG_FUNCTIONS if n not in names or names[n].end_lineno - names[n].lineno < MAX_FUNCTION_LINES]
    assert stale == []


def test_what_is_public_is_documented(written_sources):
    """Modules, classes and module-level functions; a method is documented where its name does not say it all."""
    missing = []
    for source in written_sources:
        if not ast.get_docstring(source.tree):
            missing.append(source.path)
        for node in source.tree.body:
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_") and not ast.get_docstring(node):
                missing.append(f"{source.path}::{node.name}")
    assert missing == []


def test_nothing_is_left_for_later_in_comments(files, root):
    marked = [
        name
        for name in files
        if name.endswith((".py", ".sh", ".proto", ".toml")) and name != "tests/packaging/test_code_rules.py"
        if FORGOTTEN.search((root / name).read_text())
    ]
    assert marked == []


def imported_libraries(sources) -> set[str]:
    names: set[str] = set()
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"kvsluice"}


def test_declared_dependencies_are_the_imported_ones(sources, root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[\[<>=;! ]", line)[0].lower() for line in project["dependencies"]}
    assert imported_libraries(sources) == {NAME_OF_IMPORT.get(name, name) for name in declared}


def test_constraints_pin_every_declared_dependency(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (root / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    names = {re.split(r"[\[<>=;! ]", line)[0].lower().replace("_", "-") for line in wanted}
    assert names <= pinned
