"""A whole service with keys, a token and a password: where it listens, and where nothing of them and of prompts is."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from kvsluice.client import Client
from kvsluice.errors import KvsluiceError
from kvsluice.evals.service_process import ServiceProcess, running_service
from kvsluice.protos import worker_pb2 as wpb
from kvsluice.services.processes import descendants
from kvsluice.tests.faults.rig.fleet import STUBS, Victim, command_line
from kvsluice.tests.faults.rig.redis_server import RedisServer, running

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "security.md").read_text()
PROMPT = "canary " + secrets.token_hex(8)
SESSION = "canary-session-" + secrets.token_hex(4)
TENANT = "canary-tenant"
MODEL = ("--model", "smollm2-135m", "--torch-threads", "1", "--prefill-workers", "1", "--decode-workers", "1")


@dataclass
class Guarded(Victim):
    """The service, its store, and what nobody may find.

    Attributes:
        hidden: by what it is.
    """

    service: ServiceProcess
    redis: RedisServer
    hidden: dict[str, str]

    def tree(self) -> list[psutil.Process]:
        """Every process of it."""
        pids = [self.service.process.pid, *(process.pid for process in descendants(self.service.process.pid))]
        return [psutil.Process(pid) for pid in pids]

    def found_in(self, place: str, data: bytes, found: dict[str, str], but: tuple[str, ...] = ()) -> None:
        """Note what of the hidden stands somewhere."""
        for what, text in self.hidden.items():
            if what not in but and text.encode() in data:
                found[what] = place


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    key, token, password = ("canary" + secrets.token_hex(24) for _ in range(3))
    (folder / "keys.yaml").write_text(
        f"keys: [{{tenant: {TENANT}, sha256: {hashlib.sha256(key.encode()).hexdigest()}, role: admin}}]"
    )
    (folder / "token").write_text(token)
    (folder / "password").write_text(password)
    with running(RedisServer(folder / "redis", store_password=password)) as redis:
        store = ("--store-url", f"redis://store@127.0.0.1:{redis.port}", "--store-password-file", folder / "password")
        files = ("--api-keys-file", folder / "keys.yaml", "--fleet-token-file", folder / "token")
        with running_service(*MODEL, *map(str, store + files), "--log-level", "debug") as service:
            environ = psutil.Process(service.process.pid).environ()
            hidden = {"the key": key, "the fleet's token": token, "the store's password": password, "a prompt": PROMPT}
            hidden |= {"a session's id": SESSION}
            assert "RAY_AUTH_TOKEN" not in environ, "the service makes it itself, behind its own start"
            yield Guarded(service, redis, hidden)


def test_every_socket_is_on_loopback_and_on_the_page(guarded):
    listed = {line.split("|")[1].strip(" `") for line in PAGE.partition("## Sockets")[2].splitlines() if "|" in line}
    wrong, owners = [], set()
    for process in guarded.tree():
        for socket in process.net_connections("inet"):
            if socket.status != psutil.CONN_LISTEN:
                continue
            name = process.name().removeprefix("ray::")
            if name.startswith("python"):
                name = next((part.rpartition("/")[2] for part in process.cmdline() if part.endswith(".py")), "serve")
            owners.add(name)
            if socket.laddr.ip not in ("127.0.0.1", "::ffff:127.0.0.1") or name not in listed:
                wrong.append((name, socket.laddr))
    assert wrong == []
    assert {"PrefillWorker", "DecodeWorker", "Gateway", "gcs_server", "raylet"} <= owners


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_workers_port_wants_the_token(guarded, role):
    (worker,) = guarded.actors(role)
    ports = [one.laddr.port for one in psutil.Process(worker.pid).net_connections("tcp") if one.status == "LISTEN"]
    codes = {}
    for port in ports:  # Ray listens, too
        for token in (None, guarded.hidden["the key"], guarded.hidden["the fleet's token"]):
            shown = () if token is None else (("authorization", f"Bearer {token}"),)
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                try:
                    STUBS[role](channel).Info(wpb.InfoRequest(), timeout=20.0, metadata=shown)
                    codes[port, token] = "OK"
                except grpc.RpcError as exc:
                    codes[port, token] = exc.code().name
    right = [(port, token) for (port, token), code in codes.items() if code == "OK"]
    assert [token for _, token in right] == [guarded.hidden["the fleet's token"]]
    assert {code for (port, _), code in codes.items() if port == right[0][0]} == {"OK", "UNAUTHENTICATED"}


def ask_all(guarded: Guarded) -> list[str]:
    """Have the service work with all that is hidden, rightly and wrongly. Returns what errors said."""
    said = []
    chat = [{"role": "user", "content": PROMPT}]
    wrong = (
        (PROMPT * 20_000, {}),
        (PROMPT, {"max_tokens": 10**9}),
        (PROMPT, {"stop": PROMPT * 50}),
        (chat, {"recipe": "x"}),
        (PROMPT + "\0", {}),
        ([*chat, {"role": "robot", "content": PROMPT}], {}),
        (PROMPT, {"timeout_s": 0.001}),
    )
    with Client(guarded.address, api_key=guarded.hidden["the key"], timeout_s=120.0) as client:
        for prompt in (PROMPT, chat):
            client.generate(prompt, max_tokens=20, durability="tokens", stop=[PROMPT])
        client.generate(PROMPT, max_tokens=8, session_id=SESSION)
        for prompt, options in wrong:
            with pytest.raises(KvsluiceError) as caught:
                client.generate(prompt, **({"max_tokens": 2} | options))
            said.append(repr(caught.value))
    with httpx.Client(headers={"Authorization": f"Bearer {guarded.hidden['the key']}"}, timeout=120.0) as http:
        url, model = guarded.service.http_url, "smollm2-135m"
        for body in (
            {"model": model, "messages": chat, "max_tokens": 4},
            {"model": model, "messages": [{"role": "robot", "content": PROMPT}]},
            {"model": model, "messages": chat, "max_tokens": PROMPT[:6]},
            {"model": model, "messages": PROMPT},
            {"model": model, "messages": chat, "tools": [PROMPT]},
        ):
            said.append(http.post(f"{url}/chat/completions", json=body).text)
        said.append(http.post(f"{url}/chat/completions", content=json.dumps(PROMPT)[:-1]).text)
        said.append(http.get(url.removesuffix("/v1") + "/metrics").text)
    return said


def test_no_secret_and_no_prompt_is_anywhere_but_where_it_belongs(guarded):
    said, found = ask_all(guarded), {}
    guarded.found_in("an error, an answer or /metrics", "\n".join(said).encode(), found)
    guarded.found_in("the log", guarded.service.log.read_bytes(), found)
    gcs = guarded.find("gcs_server")
    (logs,) = [part.partition("=")[2] for part in command_line(gcs).split() if part.startswith("--log_dir=")]
    files = [path for path in Path(logs).parent.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 10
    for path in files:
        guarded.found_in(path.name, path.read_bytes(), found)
    for process in guarded.tree():
        guarded.found_in(f"the arguments of {process.name()}", "\0".join(process.cmdline()).encode(), found)
        guarded.found_in(f"the environment of {process.name()}", repr(process.environ()).encode(), found)
    keys = guarded.redis.run("KEYS", "*")
    assert any(key.startswith(b"kvsluice:record:") for key in keys)
    guarded.found_in("a key of the store", b"\n".join(keys), found)
    assert found == {}
    assert not any(TENANT.encode() in key for key in keys)
