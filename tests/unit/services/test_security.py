"""Who may call what, by table, token and key; no network."""

from __future__ import annotations

import hashlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsluice.errors import ConfigError, InvalidRequest, PermissionDenied, Unauthenticated
from kvsluice.protos import generation_pb2, worker_pb2
from kvsluice.services import cli_keys, security
from kvsluice.services.config import ServeConfig, config_keys, load_config
from kvsluice.services.keys import KeysFile, TenantLimits, new_key, parse_keys
from kvsluice.services.security import METHODS, Caller, FleetGuard, FleetSecurity, OpenGuard, Role, with_fleet_tokens

KEY, OTHER, SCRAPER, CHIEF = (f"{name}-key-of-16-or-more" for name in ("first", "other", "scraper", "chief"))
TOKEN = "t" * 32


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


YAML = f"""
keys:
  - {{tenant: alice, sha256: {sha256(KEY)}}}
  - {{tenant: bob, sha256: {sha256(OTHER)}, role: client}}
  - {{tenant: ops, sha256: {sha256(SCRAPER)}, role: monitor}}
  - {{tenant: ops, sha256: {sha256(CHIEF)}, role: admin}}
tenants:
  alice: {{priority: high, weight: 2, tokens_per_s: 500, max_num_seqs: 8, stored_bytes: 4096}}
"""


@pytest.fixture
def keys(tmp_path):
    file = tmp_path / "keys.yaml"
    file.write_text(YAML)
    return KeysFile(str(file))


def test_every_method_of_every_service_is_in_the_table():
    served = {
        f"/{service.full_name}/{method.name}"
        for module in (generation_pb2, worker_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert served == {name for name in METHODS if name.startswith(("/kvsluice.v1.", "/kvsluice.worker."))}
    assert {METHODS[name] for name in served if name.startswith("/kvsluice.worker.")} == {"fleet"}
    assert {METHODS[name] for name in served if name.startswith("/kvsluice.v1.")} == {"client"}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_a_role_may_call(keys, method):
    may = {
        "public": {None, KEY, SCRAPER, CHIEF},
        "client": {KEY, CHIEF},
        "monitor": {SCRAPER, CHIEF},
        "admin": {CHIEF},
        "fleet": set(),
    }[METHODS[method]]
    for key in (None, KEY, SCRAPER, CHIEF):
        header = None if key is None else f"Bearer {key}"
        if key in may:
            keys.authorize(method, header)
        else:
            with pytest.raises(Unauthenticated if key is None else PermissionDenied):
                keys.authorize(method, header)


@pytest.mark.parametrize("guard", [OpenGuard(), FleetGuard(()), FleetGuard((TOKEN,))])
@pytest.mark.parametrize("method", ["/kvsluice.v1.Generation/Debug", "/x.Y/Z", "", "/kvsluice.v1.Generation/"])
def test_a_method_that_is_not_in_the_table_is_refused(guard, keys, method):
    for one in (guard, keys):
        with pytest.raises(PermissionDenied):
            one.authorize(method, f"Bearer {TOKEN}")


def test_a_gateway_without_keys_is_open_but_not_for_the_fleets_methods():
    guard = OpenGuard()
    assert guard.authorize(security.GENERATE, None).tenant == ""
    assert guard.authorize(security.METRICS, None).role is Role.ADMIN
    with pytest.raises(PermissionDenied):
        guard.authorize("/kvsluice.worker.v1.DecodeWorker/Attach", f"Bearer {TOKEN}")


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer é"]
)
def test_a_worker_lets_in_who_has_a_token(header):
    guard = FleetGuard(("u" * 32, TOKEN))
    method = "/kvsluice.worker.v1.DecodeWorker/PutFrames"
    assert guard.authorize(method, f"bearer {TOKEN}").role is Role.FLEET
    with pytest.raises(Unauthenticated):
        guard.authorize(method, header)
    with pytest.raises(PermissionDenied):
        guard.authorize(security.GENERATE, f"Bearer {TOKEN}")


def test_a_keys_tenant_and_its_limits(keys):
    caller = keys.authorize(security.GENERATE, f"Bearer {KEY}")
    assert (caller.tenant, caller.role) == ("alice", Role.CLIENT)
    assert keys.limits(caller.tenant) == TenantLimits(
        priority="high", weight=2, tokens_per_s=500, max_num_seqs=8, stored_bytes=4096
    )
    assert keys.limits(keys.authorize(security.GENERATE, f"Bearer {OTHER}").tenant) == TenantLimits()
    assert KEY not in repr(vars(keys))


def test_lines_are_keys_each_its_own_tenant(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# two\n{KEY}\n\n  {OTHER}  \n")
    keys = KeysFile(str(file))
    tenants = {keys.authorize(security.GENERATE, f"Bearer {key}").tenant for key in (KEY, OTHER)}
    assert len(tenants) == 2
    assert KEY not in repr(vars(keys)) + str(tenants)


def test_a_changed_file_counts_without_a_restart(tmp_path, caplog):
    file, now = tmp_path / "keys", [0.0]
    file.write_text(f"{KEY}\n")
    keys = KeysFile(str(file), lambda: now[0], aside=lambda job: job())

    def replace(text):
        (tmp_path / "new").write_text(text)
        os.replace(tmp_path / "new", file)
        now[0] += 2

    replace(f"{KEY}\n{OTHER}\n")
    keys.authorize(security.GENERATE, f"Bearer {OTHER}")
    replace(f"{OTHER}\n")
    with pytest.raises(Unauthenticated):
        keys.authorize(security.GENERATE, f"Bearer {KEY}")
    for broken in ("short\n", "", "\udcff"):
        replace(broken.encode(errors="surrogateescape").decode("latin-1"))
        keys.authorize(security.GENERATE, f"Bearer {OTHER}")
    assert len([r for r in caplog.records if "stay as they were" in r.message]) == 3
    file.unlink()
    now[0] += 2
    keys.authorize(security.GENERATE, f"Bearer {OTHER}")
    assert OTHER not in caplog.text


def test_a_changed_file_is_read_aside_once_at_a_time(tmp_path):
    """Thousands of keys take seconds, in which an event loop would hold everybody up."""
    file, now, jobs = tmp_path / "keys", [0.0], []
    file.write_text(f"{KEY}\n")
    keys = KeysFile(str(file), lambda: now[0], aside=jobs.append)
    file.write_text(f"{OTHER}\n")
    now[0] += 2
    keys.authorize(security.GENERATE, f"Bearer {KEY}")
    file.write_text(f"{KEY}\n{OTHER}\n")
    now[0] += 2
    keys.authorize(security.GENERATE, f"Bearer {KEY}")
    assert len(jobs) == 1, "the first one is not done"
    jobs.pop()()
    now[0] += 2
    for key in (KEY, OTHER):
        keys.authorize(security.GENERATE, f"Bearer {key}")
    assert len(jobs) <= 1


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "keys"),
        ("keys: !!bool x", "YAML"),
        ("keys: !!timestamp x", "YAML"),
        ("keys: []", "keys"),
        ("- a", "keys"),
        ("keys: [{tenant: a}]", "keys.0.sha256"),
        (f"keys: [{{tenant: a, sha256: {KEY}}}]", "keys.0.sha256"),
        (f"keys: [{{tenant: 'a:b', sha256: {sha256(KEY)}}}]", "keys.0.tenant"),
        (f'keys: [{{tenant: "a\\n", sha256: {sha256(KEY)}}}]', "keys.0.tenant"),
        (f"keys: [{{tenant: {'x' * 10000}, sha256: {sha256(KEY)}}}]", "keys.0.tenant"),
        (f"keys: [{{tenant: a, sha256: {sha256(KEY)}, key: {KEY}}}]", "keys.0.key"),
        (f"keys: [{{tenant: a, sha256: {sha256(KEY)}, role: fleet}}]", "keys.0.role"),
        (f"keys: [{{tenant: a, sha256: {sha256(KEY)}}}, {{tenant: b, sha256: {sha256(KEY)}}}]", "keys.1.sha256"),
        (YAML + "  carol: {weight: 1}\n", "tenants.carol"),
        (YAML.replace("weight: 2", "weight: .nan"), "tenants.alice.weight"),
        (YAML.replace("weight: 2", "weight: 0"), "tenants.alice.weight"),
        (YAML.replace("tokens_per_s: 500", "tokens_per_s: -1"), "tenants.alice.tokens_per_s"),
        (YAML.replace("stored_bytes: 4096", "stored_bytes: 0"), "tenants.alice.stored_bytes"),
        (YAML.replace("high", "highest"), "tenants.alice.priority"),
        # a limit that nothing keeps to is none
        (YAML.replace("weight: 2", "stored_tokens: 1000"), "tenants.alice.stored_tokens"),
        ("a: [", "YAML"),
        ("!!python/object/apply:os.system ['touch /tmp/x']", "YAML"),
        ("[" * 5000, "YAML"),
    ],
)
def test_a_bad_keys_file_is_refused_by_name_and_told_nothing_of(text, named):
    with pytest.raises(ConfigError, match="api_keys_file") as caught:
        parse_keys(text, True, "keys.yaml")
    assert named in caught.value.message
    assert KEY not in caught.value.message
    assert len(caught.value.message) < 1000


@given(st.text(max_size=200), st.booleans())
def test_any_text_is_keys_or_refused(text, is_yaml):
    try:
        assert parse_keys(text, is_yaml, "keys").callers
    except ConfigError as exc:
        assert exc.message.startswith("api_keys_file")


@given(st.one_of(st.none(), st.text(max_size=100)))
def test_any_header_is_a_caller_or_refused(header):
    guard = FleetGuard((TOKEN,))
    with pytest.raises(Unauthenticated):
        guard.authorize("/kvsluice.worker.v1.DecodeWorker/Info", header)


def test_new_keys_are_long_and_different():
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert parse_keys("\n".join(made), False, "keys").callers.keys()


def test_the_command_makes_a_key_and_its_line(capsys):
    cli_keys.new("alice", "admin")
    key, line = (said.partition(": ")[2] for said in capsys.readouterr().out.splitlines())
    keys = parse_keys(f"keys:\n  {line}", True, "keys.yaml")
    assert keys.callers == {hashlib.sha256(key.encode()).digest(): Caller(Role.ADMIN, "alice")}
    for tenant, role in (("a:b", "client"), ("", "client"), ("alice", "fleet")):
        with pytest.raises(InvalidRequest):
            cli_keys.new(tenant, role)


def test_the_fleets_tokens(tmp_path):
    config = with_fleet_tokens(load_config({}))
    assert len(config.fleet_tokens[0]) == 64
    assert with_fleet_tokens(config) is config, "a token is made once"
    assert config.fleet_tokens[0] not in repr(config) + repr(FleetSecurity.of(config))
    assert ServeConfig.from_json(config.to_json()).fleet_tokens == config.fleet_tokens
    assert "fleet_tokens" not in config_keys()
    with pytest.raises(ConfigError, match="KVSLUICE_FLEET_TOKENS"):
        load_config({}, {"KVSLUICE_FLEET_TOKENS": TOKEN})
    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n{'u' * 40}\n")
    assert with_fleet_tokens(load_config({"fleet_token_file": str(file)})).fleet_tokens == (TOKEN, "u" * 40)
    for text in ("", "short\n", f"{TOKEN} x\n", "é" * 40):
        file.write_text(text)
        with pytest.raises(ConfigError, match="fleet_token_file"):
            with_fleet_tokens(load_config({"fleet_token_file": str(file)}))


def test_a_worker_without_token_and_certificate_stays_on_loopback():
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        FleetSecurity().check_host(host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "::ffff:10.0.0.1", "127.0.0.1.example.org"):
        FleetSecurity((TOKEN,)).check_host(host)
        with pytest.raises(ConfigError, match="everybody"):
            FleetSecurity().check_host(host)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"host": "0.0.0.0"}, "host"),
        ({"host": "::"}, "host"),
        ({"host": "some.host"}, "host"),
        ({"tls_cert_file": "c"}, "tls_key_file"),
        ({"tls_key_file": "k"}, "tls_cert_file"),
        ({"tls_client_ca_file": "a"}, "tls_client_ca_file"),
        ({"fleet_tls_cert_file": "c", "fleet_tls_key_file": "k"}, "fleet_tls_ca_file"),
        ({"fleet_tls_ca_file": "c"}, "fleet_tls_cert_file"),
        ({"fleet_tls_name": "worker"}, "fleet_tls_name"),
    ],
)
def test_settings_that_contradict_are_refused_by_name(given, key):
    with pytest.raises(ConfigError, match=f"^{key}: "):
        load_config(given)


@pytest.mark.parametrize(
    "more",
    [
        {"allow_anonymous": True},
        {"api_keys_file": "keys"},
        {"tls_cert_file": "c", "tls_key_file": "k", "tls_client_ca_file": "a"},
    ],
)
def test_other_addresses_need_keys_certificates_or_a_word(more):
    assert load_config({"host": "0.0.0.0"} | more).host == "0.0.0.0"
