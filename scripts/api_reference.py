"""Write docs/api.md from protos/generation.proto and errors.py; --check compares and changes nothing.

What a message or a field is for stands in the .proto file's comments, before it or behind it on its line.
"""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet

from kvsluice import errors

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
PROTO = "kvsluice/protos/generation.proto"
MESSAGES, FIELDS, SERVICES = 4, 2, 6  # numbers of fields in descriptor.proto, of which paths to comments are made

HEAD = """# API

`kvsluice.v1.Generation` over gRPC, made from [protos/generation.proto](../protos/generation.proto) and
[errors.py](../errors.py) by `scripts/api_reference.py`. The server speaks `grpc.health.v1` (the empty name says that
the process lives, `kvsluice.v1.Generation` that requests would be served) and reflection, so `grpcurl` needs no files.
A key of [security.md](security.md) goes into the metadata as `authorization: Bearer KEY`. [http.md](http.md) describes
the OpenAI API.

`kvsluice.Client` wraps all of it:

```python
from kvsluice import Client

with Client("127.0.0.1:8033") as client:
    answer = client.generate("The capital of France is", max_tokens=8, temperature=0.0)
    print(answer.text, answer.usage)
```

A field that is `optional` is absent unless it is set; the others are empty or 0. Numbers outside of what a field allows
are refused before anything runs, by an `InvalidRequest` that names field and range.
"""


def descriptor() -> FileDescriptorProto:
    """The .proto file with its comments. Raises `RuntimeError`: protoc refused it."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "set"
        protoc = [sys.executable, "-m", "grpc_tools.protoc", f"-Ikvsluice/protos={ROOT / 'protos'}", PROTO]
        command = [*protoc, "--include_source_info", f"--descriptor_set_out={out}"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip())
        files = FileDescriptorSet()
        files.ParseFromString(out.read_bytes())
        file: FileDescriptorProto = files.file[0]
        return file


class Comments:
    """Comments by the path of what they are about."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._found = {tuple(place.path): place for place in file.source_code_info.location}

    def of(self, *path: int) -> str:
        """The words before and behind a thing, on one line."""
        place = self._found.get(path)
        if place is None:
            return ""
        return " ".join(f"{place.leading_comments} {place.trailing_comments}".split())


def kind(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    """A field's type as the .proto file has it; messages of the page are linked."""
    name = field.type_name.rpartition(".")[2]
    nested = next((one for one in message.nested_type if one.name == name), None)
    if nested is not None and nested.options.map_entry:
        key, value = nested.field
        return f"map of {kind(key, nested)} to {kind(value, nested)}"
    if name:
        text = f"[{name}](#{name.lower()})"
    else:
        text = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"list of {text}"
    return f"optional {text}" if field.proto3_optional else text


def message_lines(message: DescriptorProto, comments: Comments, at: tuple[int, ...]) -> Iterator[str]:
    """One message: its words and a table of its fields."""
    yield from ("", f"### {message.name}", "")
    about = comments.of(*at)
    if about:
        yield from (about, "")
    if not message.field:
        yield "No fields."
        return
    yield from ("| field | type | |", "| --- | --- | --- |")
    for index, field in enumerate(message.field):
        words = comments.of(*at, FIELDS, index)
        if field.HasField("oneof_index") and not field.proto3_optional:
            one_of = f"one of `{message.oneof_decl[field.oneof_index].name}`"
            words = f"{one_of}; {words}" if words else one_of
        yield f"| `{field.name}` | {kind(field, message)} | {words.replace('|', chr(92) + '|')} |"


def error_lines() -> Iterator[str]:
    """The tree of errors, a line each."""
    yield from ("| error | gRPC | HTTP | again? | |", "| --- | --- | ---: | --- | --- |")
    classes: list[Any] = [one for one in vars(errors).values() if inspect.isclass(one)]
    for error in classes:
        if issubclass(error, errors.KvsluiceError) and error is not errors.KvsluiceError:
            about = (error.__doc__ or "").strip().split("\n\n")[0]
            again = "yes" if error.retryable else "no"
            yield f"| `{error.__name__}` | {error.status} | {error.http_status} | {again} | {' '.join(about.split())} |"


def page() -> str:
    """The whole page."""
    file = descriptor()
    comments = Comments(file)
    lines = [HEAD]
    for number, service in enumerate(file.service):
        lines += [f"## {file.package}.{service.name}", "", comments.of(SERVICES, number), ""]
        lines += ["| method | takes | gives | |", "| --- | --- | --- | --- |"]
        for index, method in enumerate(service.method):
            taken, given = (name.rpartition(".")[2] for name in (method.input_type, method.output_type))
            stream = "stream of " if method.server_streaming else ""
            words = comments.of(SERVICES, number, 2, index)
            takes, gives = f"[{taken}](#{taken.lower()})", f"{stream}[{given}](#{given.lower()})"
            lines.append(f"| `{method.name}` | {takes} | {gives} | {words} |")
    lines += ["", "## Messages"]
    for index, message in enumerate(file.message_type):
        lines += message_lines(message, comments, (MESSAGES, index))
    lines += ["", "## Errors", "", "`kvsluice.errors` has them as classes; `ErrorInfo.type` is the class's name.", ""]
    return "\n".join([*lines, *error_lines()]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or with --check say whether it is stale; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the tree and change nothing")
    fresh = page()
    if not parser.parse_args(arguments).check:
        PAGE.write_text(fresh, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != fresh:
        print("docs/api.md is stale: run scripts/api_reference.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
