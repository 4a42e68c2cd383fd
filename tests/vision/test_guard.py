"""Who may talk to the service: certificates, tokens, users of the machine; and the standard services behind them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc.aio
import pytest
from golden_data import TINY
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from watched import Service, WatchedEncoder, running, thumbnail

from foveate.chat.assets import ModelAssets
from foveate.config import Settings, VisionSettings
from foveate.errors import ConfigError
from foveate.transport.local import LocalArena
from foveate.vision import vision_pb2 as pb
from foveate.vision.guard import UnixRelay, check_listen, private_socket
from foveate.vision.rpc import SERVICE, Stub
from foveate.vision.service import VisionServer

TOKEN = "open sesame"
Start = Callable[..., contextlib.AbstractContextManager[running]]


@pytest.fixture
def start(encoder: WatchedEncoder, arena: LocalArena) -> Start:
    """A function that runs the service at an address, with what its clients have to show."""

    def run(listen: str, **vision: str) -> running:
        settings = Settings(vision=VisionSettings(preprocess_threads=1, **vision))  # type: ignore[arg-type]
        server = VisionServer(encoder, arena, ModelAssets.from_folder(TINY).pictures, settings, "tiny")
        return running(server, listen)

    return run


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two authorities (ca, other-ca) and a certificate of each (this, other), valid for localhost."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1\n")
    for ca, name in (("ca", "this"), ("other-ca", "other")):
        openssl("req", "-x509", *key, "-keyout", f"{ca}.key", "-out", f"{ca}.pem", "-subj", f"/CN={ca}", "-days", "2")
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signing = ("-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial", "-extfile", "names", "-days", "2")
        openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.pem")
    return folder


def tls(folder: Path) -> dict[str, str]:
    names = {"vision_tls_cert": "this.pem", "vision_tls_key": "this.key", "vision_tls_ca": "ca.pem"}
    return {field: str(folder / name) for field, name in names.items()}


def client_credentials(folder: Path, name: str | None) -> grpc.ChannelCredentials:
    files = {}
    if name is not None:
        files = {"private_key": (folder / f"{name}.key").read_bytes()}
        files["certificate_chain"] = (folder / f"{name}.pem").read_bytes()
    return grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes(), **files)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def code_of(call: object) -> grpc.StatusCode:
    """Return the status of a call of one reply or of several."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call  # type: ignore[misc]
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def codes(channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...] | None) -> set[grpc.StatusCode]:
    """Call every method of every service and return the statuses."""
    stub, health = Stub(channel), health_pb2_grpc.HealthStub(channel)
    # Without a request: this client takes a refusal that comes before it has sent one for an error of its own.
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(metadata=metadata)
    with contextlib.suppress(asyncio.InvalidStateError):
        await reflection.done_writing()
    calls = [
        stub.Health(pb.HealthRequest(), metadata=metadata),
        stub.Stats(pb.StatsRequest(), metadata=metadata),
        stub.Cancel(pb.CancelRequest(request_id="x"), metadata=metadata),
        stub.Encode(pb.EncodeRequest(pictures=[pb.Picture(data=thumbnail(), max_slice_nums=1)]), metadata=metadata),
        health.Check(health_pb2.HealthCheckRequest(service=SERVICE), metadata=metadata),
    ]
    unknown = await code_of(channel.unary_unary("/no.such/Method")(b"", metadata=metadata))
    known = {await code_of(call) for call in calls} | {await reflection.code()}
    # That a method is unknown is only told to those who may ask.
    return known | {unknown} - {grpc.StatusCode.UNIMPLEMENTED}


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
async def test_every_method_asks_for_the_token(start: Start, host: str) -> None:
    with start(f"{host}:0", vision_token=TOKEN) as server:
        assert server.address.startswith(host)
        assert not server.address.endswith(":0")
        async with grpc.aio.insecure_channel(server.address) as channel:
            assert await codes(channel, bearer(TOKEN)) == {grpc.StatusCode.OK}
            for wrong in (None, bearer("open"), bearer(TOKEN + "!"), bearer(""), (("authorization", TOKEN),)):
                assert await codes(channel, wrong) == {grpc.StatusCode.UNAUTHENTICATED}


async def test_mutual_tls_takes_certificates_of_its_authority_only(start: Start, certificates: Path) -> None:
    with start("127.0.0.1:0", **tls(certificates)) as server:
        for name, expected in (("this", "OK"), ("other", "UNAVAILABLE"), (None, "UNAVAILABLE")):
            credentials = client_credentials(certificates, name)
            async with grpc.aio.secure_channel(server.address, credentials) as channel:
                assert (await code_of(Stub(channel).Health(pb.HealthRequest()))).name == expected
        async with grpc.aio.insecure_channel(server.address) as channel:
            assert await code_of(Stub(channel).Health(pb.HealthRequest())) is grpc.StatusCode.UNAVAILABLE


async def test_tls_and_token_are_both_asked_for(start: Start, certificates: Path) -> None:
    with start("127.0.0.1:0", **tls(certificates), vision_token=TOKEN) as server:
        credentials = client_credentials(certificates, "this")
        async with grpc.aio.secure_channel(server.address, credentials) as channel:
            assert await codes(channel, None) == {grpc.StatusCode.UNAUTHENTICATED}
            assert await codes(channel, bearer(TOKEN)) == {grpc.StatusCode.OK}


@pytest.mark.parametrize(
    ("listen", "vision", "message"),
    [
        ("0.0.0.0:0", {}, r"other machines can reach 0\.0\.0\.0:0, so clients must show who they are"),
        ("[::]:0", {}, r"other machines can reach"),
        ("example.org:50051", {}, r"other machines can reach"),
        ("127.0.0.1:0", {}, r"other users of this machine can reach 127\.0\.0\.1:0.*or listen on unix:PATH"),
        ("127.0.0.1:0", {"vision_token": ""}, "vision_token: must be printable ASCII"),
        ("127.0.0.1:0", {"vision_token": "Schlüssel"}, "vision_token: must be printable ASCII"),
        ("127.0.0.1:0", {"vision_tls_cert": "this.pem"}, "vision_tls_key: is missing; mutual TLS takes"),
        ("127.0.0.1:0", {"vision_token": TOKEN, "vision_tls_ca": "ca.pem"}, "vision_tls_cert: is missing"),
        ("127.0.0.1", {"vision_token": TOKEN}, r"got '127\.0\.0\.1', expected unix:PATH, HOST:PORT or \[IPv6\]:PORT"),
        ("127.0.0.1:65536", {"vision_token": TOKEN}, "expected unix:PATH"),
        ("::1:50051", {"vision_token": TOKEN}, "expected unix:PATH"),
        ("unix:", {}, "expected unix:PATH"),
        ("unix:/" + "x" * 200, {}, "too long for a unix socket"),
    ],
)
def test_addresses_that_are_refused(listen: str, vision: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_listen(listen, VisionSettings(**vision))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "name", "message"),
    [
        ("vision_tls_key", "names", r"vision_tls_key: .* are not a certificate and its key"),
        ("vision_tls_key", "other.key", r"vision_tls_key: .* are not a certificate and its key"),
        ("vision_tls_ca", "names", r"vision_tls_ca: .* holds no certificates"),
        ("vision_tls_key", "nowhere", r"vision_tls_key: .*nowhere cannot be read"),
    ],
)
def test_certificates_that_cannot_be_used(certificates: Path, field: str, name: str, message: str) -> None:
    files = tls(certificates) | {field: str(certificates / name)}
    with pytest.raises(ConfigError, match=message):
        check_listen("127.0.0.1:0", VisionSettings(**files))  # type: ignore[arg-type]


async def test_a_port_has_one_server(start: Start) -> None:
    with (
        start("127.0.0.1:0", vision_token=TOKEN) as server,
        pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:\d+"),
        start(server.address, vision_token=TOKEN),
    ):
        pass


def test_a_unix_socket_is_the_user_s_own_and_goes_with_the_server(start: Start, socket_folder: Path) -> None:
    path = socket_folder / "v.sock"
    with start(f"unix:{path}"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(ConfigError, match=r"cannot listen on unix:.*in use"), start(f"unix:{path}"):
            pass
        assert path.is_socket()
        assert private_socket(path).is_socket()
    assert list(socket_folder.iterdir()) == []


async def test_a_socket_that_a_killed_server_left_is_replaced(start: Start, socket_folder: Path) -> None:
    path = socket_folder / "v.sock"
    private_socket(path).parent.mkdir()
    for name in (path, private_socket(path)):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(name))
    with start(f"unix:{path}"):
        assert stat.S_IMODE(private_socket(path).parent.stat().st_mode) == 0o700
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            assert await codes(channel, None) == {grpc.StatusCode.OK}


def test_a_private_folder_that_is_not_the_user_s_own_is_refused(start: Start, socket_folder: Path) -> None:
    path = socket_folder / "v.sock"
    private_socket(path).parent.symlink_to(socket_folder)
    with pytest.raises(ConfigError, match=r"cannot make .*v\.sock\.d"), start(f"unix:{path}"):
        pass
    assert private_socket(path).parent.is_symlink()


def test_what_is_no_socket_is_left_alone(start: Start, socket_folder: Path) -> None:
    path = socket_folder / "notes.txt"
    path.write_text("keep me")
    with pytest.raises(ConfigError, match="cannot listen on unix:"), start(f"unix:{path}"):
        pass
    assert path.read_text() == "keep me"


@pytest.mark.parametrize("stranger", [False, True])
async def test_only_the_same_user_gets_through_a_unix_socket(
    socket_folder: Path, stranger: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
        writer.close()

    sent = os.urandom(3_000_000)
    target = socket_folder / "target"
    server = await asyncio.start_unix_server(echo, target)
    relay = UnixRelay(socket_folder / "relay", target, uid=os.geteuid() + stranger)
    relay.listen()
    reader, writer = await asyncio.open_unix_connection(relay.path)
    if stranger:
        assert await reader.read() == b""
        assert "refused a process of another user" in caplog.text
    else:
        writer.write(sent)
        assert await reader.readexactly(len(sent)) == sent
        server.close()
        assert "refused" not in caplog.text
    writer.close()
    await writer.wait_closed()
    await relay.close()
    server.close()
    await server.wait_closed()


async def test_standard_tools_find_their_way(service: Service) -> None:
    health = health_pb2_grpc.HealthStub(service.channel)
    for name in ("", SERVICE):
        reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    service.server.stop()
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_reflection_describes_the_service(start: Start, socket_folder: Path) -> None:
    path = socket_folder / "v.sock"
    with start(f"unix:{path}"), grpc.insecure_channel(f"unix:{path}") as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert SERVICE in database.get_services()
        [described] = database.FindFileContainingSymbol(SERVICE).service
        assert [method.name for method in described.method] == ["Encode", "Cancel", "Health", "Stats"]
