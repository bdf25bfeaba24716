"""Keys, tokens and certificates over real gRPC: who is let in, who is not, and what each is told."""

from __future__ import annotations

import datetime
import ipaddress
import os
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvsluice.errors import ConfigError
from kvsluice.protos import generation_pb2, worker_pb2
from kvsluice.services.config import load_config
from kvsluice.services.lifecycle import WorkerHost
from kvsluice.services.rpc import make_channel, with_metadata
from kvsluice.services.security import FleetSecurity, check_files
from kvsluice.services.tls import TlsFiles, channel_credentials
from kvsluice.tests.faults.rig.certificates import Authority

KEY, TOKEN = "a-key-of-16-or-more", "t" * 40


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def keys_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n")
    return str(file)


def metadata(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def status(channel, method, streams: bool) -> grpc.StatusCode:
    """What an empty call of a method ends with."""
    call = (channel.stream_stream if streams else channel.unary_stream)(method)
    try:
        await (call(iter(())) if streams else call(b"", timeout=10)).read()
    except grpc.aio.AioRpcError as exc:
        return exc.code()
    return grpc.StatusCode.OK


def methods(module):
    for service in module.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            yield f"/{service.full_name}/{method.name}", method.client_streaming


async def test_every_method_of_the_gateway_wants_a_key(make_fleet, keys_file):
    fleet = await make_fleet(api_keys_file=keys_file)
    async with grpc.aio.insecure_channel(fleet.address) as channel:
        for method, streams in methods(generation_pb2):
            assert await status(channel, method, streams) is grpc.StatusCode.UNAUTHENTICATED
            for bad in (KEY[:-1], KEY + "x", KEY.upper(), TOKEN):
                guessed = with_metadata(channel, metadata(bad))
                assert await status(guessed, method, streams) is grpc.StatusCode.UNAUTHENTICATED
            twice = with_metadata(channel, metadata(KEY) * 2)
            assert await status(twice, method, streams) is grpc.StatusCode.UNAUTHENTICATED
            known = with_metadata(channel, metadata(KEY))
            assert await status(known, method, streams) not in (
                grpc.StatusCode.UNAUTHENTICATED,
                grpc.StatusCode.PERMISSION_DENIED,
            )
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    assert fleet.script.opens == []


async def test_every_method_of_a_worker_wants_the_token(make_fleet):
    fleet = await make_fleet(workers=False, fleet_tokens=(TOKEN,))
    await fleet.add_worker("prefill-0", "prefill")
    await fleet.add_worker("decode-0", "decode")
    await fleet.until_ready()
    assert (await fleet.client.generate("abc")).text == "Hello, worl"
    for link in fleet.gateway.pool._links.values():
        async with grpc.aio.insecure_channel(link.member.address) as channel:
            for method, streams in methods(worker_pb2):
                if link.member.role.capitalize() not in method:
                    continue
                assert await status(channel, method, streams) is grpc.StatusCode.UNAUTHENTICATED
                for bad in (KEY, TOKEN[:-1]):
                    guessed = with_metadata(channel, metadata(bad))
                    assert await status(guessed, method, streams) is grpc.StatusCode.UNAUTHENTICATED


async def test_a_gateway_with_another_token_gets_no_worker(make_fleet, until, caplog):
    fleet = await make_fleet(workers=False, fleet_tokens=(TOKEN,), worker_wait_s=0.5)
    await fleet.add_worker("prefill-0", "prefill", security=FleetSecurity(("u" * 40,)))
    await until(lambda: "does not let this gateway in" in caplog.text)
    assert not fleet.gateway.ready
    assert TOKEN not in caplog.text


async def test_the_gateway_speaks_tls_and_nothing_else(make_fleet, authority, tmp_path):
    server, client = authority.issue("server"), authority.issue("client")
    other = Authority(tmp_path / "other", "other")
    fleet = await make_fleet(
        tls_cert_file=str(server.certificate),
        tls_key_file=str(server.key),
        tls_client_ca_file=str(authority.certificate),
    )
    ca = str(authority.certificate)
    known = TlsFiles(str(client.certificate), str(client.key), ca)
    stranger = other.issue("stranger")

    async def check(files: TlsFiles | None) -> grpc.StatusCode:
        if files is None:
            channel = grpc.aio.insecure_channel(fleet.address)
        else:
            credentials, options = channel_credentials(files)
            channel = grpc.aio.secure_channel(fleet.address, credentials, options=options)
        async with channel:
            return await status(channel, "/grpc.health.v1.Health/Check", False)

    assert await check(known) is grpc.StatusCode.OK
    for bad in (
        None,
        TlsFiles(None, None, ca),
        TlsFiles(None, None, str(other.certificate)),
        replace(known, ca=str(other.certificate)),
        replace(known, cert=str(stranger.certificate), key=str(stranger.key)),
        replace(known, name="somewhere.else"),
    ):
        assert await check(bad) is grpc.StatusCode.UNAVAILABLE, bad


def expired(authority, name):
    """A certificate of yesterday."""
    day = datetime.timedelta(days=1)
    return authority.issue(name, valid=(-3 * day, -day))


@pytest.mark.parametrize("flaw", ["authority", "host", "expired", "plain"])
async def test_a_worker_with_a_wrong_certificate_gets_no_frames_and_no_requests(make_fleet, authority, tmp_path, flaw):
    own = authority.issue("gateway")
    other = Authority(tmp_path / "other", "other")
    bad = {
        "authority": lambda: other.issue("worker"),
        "host": lambda: authority.issue("elsewhere", ("10.0.0.9",)),
        "expired": lambda: expired(authority, "late"),
        "plain": lambda: None,
    }[flaw]()
    ca = str(authority.certificate)
    names = {"cert": own.certificate, "key": own.key, "ca": ca}
    fleet = await make_fleet(workers=False, **{f"fleet_tls_{name}_file": str(path) for name, path in names.items()})
    worker = (
        FleetSecurity((TOKEN,)) if bad is None else FleetSecurity((), TlsFiles(str(bad.certificate), str(bad.key), ca))
    )
    host = WorkerHost([fleet.scripted("decode-9", "decode")], 1 << 20, worker)
    address = await host.start("127.0.0.1")
    try:
        async with make_channel(address, 1 << 20, FleetSecurity.of(fleet.config)) as channel:
            code = await status(channel, "/kvsluice.worker.v1.DecodeWorker/Info", False)
        assert code is grpc.StatusCode.UNAVAILABLE
    finally:
        await host.stop()


async def test_a_fleet_over_mutual_tls_serves(make_fleet, authority):
    pair = authority.issue("fleet-member", ("kvsluice-worker",))
    names = {"cert": pair.certificate, "key": pair.key, "ca": authority.certificate}
    fleet = await make_fleet(
        **{f"fleet_tls_{name}_file": str(path) for name, path in names.items()}, fleet_tls_name="kvsluice-worker"
    )
    assert (await fleet.client.generate("abc")).text == "Hello, worl"
    for link in fleet.gateway.pool._links.values():
        method = f"/kvsluice.worker.v1.{link.member.role.capitalize()}Worker/Info"
        async with grpc.aio.insecure_channel(link.member.address) as channel:
            assert await status(channel, method, False) is grpc.StatusCode.UNAVAILABLE


async def test_a_new_certificate_counts_without_a_restart(make_fleet, authority, tmp_path):
    first, second = authority.issue("one"), authority.issue("two", ("renewed.example",))
    paths = {"cert": tmp_path / "tls.crt", "key": tmp_path / "tls.key"}

    def use(pair):
        for name, source in (("cert", pair.certificate), ("key", pair.key)):
            (tmp_path / "new").write_bytes(source.read_bytes())
            os.replace(tmp_path / "new", paths[name])

    use(first)
    fleet = await make_fleet(tls_cert_file=str(paths["cert"]), tls_key_file=str(paths["key"]))

    async def check(name) -> grpc.StatusCode:
        credentials, options = channel_credentials(TlsFiles(None, None, str(authority.certificate), name))
        async with grpc.aio.secure_channel(fleet.address, credentials, options=options) as channel:
            return await status(channel, "/grpc.health.v1.Health/Check", False)

    assert await check("renewed.example") is grpc.StatusCode.UNAVAILABLE
    paths["key"].write_bytes(second.key.read_bytes())
    assert await check(None) is grpc.StatusCode.OK, "half a pair changes nothing"
    use(second)
    assert await check("renewed.example") is grpc.StatusCode.OK


@pytest.mark.parametrize("setting", ["tls_cert_file", "tls_key_file", "tls_client_ca_file", "fleet_tls_ca_file"])
def test_files_that_hold_no_such_thing_stop_the_start(authority, tmp_path, setting):
    pair, junk = authority.issue("pair"), tmp_path / "junk"
    ca = str(authority.certificate)
    good = {"tls_cert_file": str(pair.certificate), "tls_key_file": str(pair.key), "tls_client_ca_file": ca}
    good |= {"fleet_tls_cert_file": str(pair.certificate), "fleet_tls_key_file": str(pair.key), "fleet_tls_ca_file": ca}
    check_files(load_config(good))
    with pytest.raises(ConfigError, match=f"{setting}: cannot read"):
        check_files(load_config(good | {setting: str(junk)}))
    junk.write_text("no certificate")
    with pytest.raises(ConfigError, match=setting.replace("key", "cert")):
        check_files(load_config(good | {setting: str(junk)}))
    other = authority.issue("another")
    with pytest.raises(ConfigError, match="tls_cert_file"):
        check_files(load_config(good | {"tls_key_file": str(other.key)}))


async def test_a_gateway_listens_on_its_address_alone(make_fleet):
    before = listening()
    fleet = await make_fleet(host="127.8.4.2", http=True, http_port=0, workers=False)
    port = int(fleet.address.rpartition(":")[2])
    added = listening() - before
    assert len(added) == 2, "gRPC and HTTP"
    assert {host for host, _ in added} == {"127.8.4.2"}
    assert port in {port for _, port in added}


def listening() -> set[tuple[str, int]]:
    """Addresses on which this process listens, as the kernel has them."""
    own = {
        os.stat(f"/proc/self/fd/{fd}").st_ino
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }
    found = set()
    for table, size in (("/proc/net/tcp", 4), ("/proc/net/tcp6", 16)):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            host, port = fields[1].split(":")
            if fields[3] == "0A" and int(fields[9]) in own:
                words = bytes.fromhex(host)
                packed = b"".join(words[i : i + 4][::-1] for i in range(0, size, 4))
                address = ipaddress.ip_address(packed)
                found.add((str(getattr(address, "ipv4_mapped", None) or address), int(port, 16)))
    return found
