"""Who may talk to the vision service, and the listening that depends on it.

Over TCP a client shows a certificate, a token or both; gRPC checks the first, :class:`TokenInterceptor` the second.
Over a unix socket it is the kernel that says who the client is, which gRPC does not ask: so :class:`UnixRelay` listens
instead, asks, and relays the bytes to gRPC's own socket in a folder that nobody else can enter.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import shutil
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from foveate.config import VisionSettings
from foveate.errors import ConfigError
from foveate.transport.lender import same_user
from foveate.vision.address import Address, TcpAddress, UnixAddress, parse_address
from foveate.vision.rpc import TOKEN_KEY

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 2**18
_MAX_PATH_BYTES = 107
_PRIVATE = ".d/s"


def check_listen(listen: str, vision: VisionSettings) -> Address:
    """Check an address, and that whoever reaches it has to show who they are, before anything is loaded.

    Raises:
        ConfigError: it is no address, or it is one of TCP with neither a token nor mutual TLS; a file of the latter is
            missing.
    """
    address = parse_address(listen)
    if isinstance(address, UnixAddress):
        if len(os.fsencode(private_socket(address.path))) > _MAX_PATH_BYTES:
            most = _MAX_PATH_BYTES - len(_PRIVATE)
            raise ConfigError(f"listen: {address.path} is too long for a unix socket (at most {most} bytes)")
        return address
    tls = credentials(vision) is not None
    token = _token(vision) is not None
    if not (tls or token):
        who = "other users of this machine" if address.is_loopback else "other machines"
        raise ConfigError(
            f"listen: {who} can reach {listen}, so clients must show who they are: set --vision-token, or "
            "--vision-tls-cert, --vision-tls-key and --vision-tls-ca (or listen on unix:PATH)"
        )
    if not tls and not address.is_loopback:
        logger.warning("%s is not encrypted: pictures and the token can be read on the way there", listen)
    return address


def _token(vision: VisionSettings) -> str | None:
    token = vision.vision_token
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token and token):
        raise ConfigError("vision_token: must be printable ASCII characters, without spaces around them")
    return token


def credentials(vision: VisionSettings) -> grpc.ServerCredentials | None:
    """Read the certificates for mutual TLS, if they are set.

    Raises:
        ConfigError: some but not all are set, or one cannot be read.
    """
    names = ("vision_tls_cert", "vision_tls_key", "vision_tls_ca")
    paths = {name: getattr(vision, name) for name in names}
    if not any(paths.values()):
        return None
    for name, path in paths.items():
        if not path:
            raise ConfigError(f"{name}: is missing; mutual TLS takes {', '.join(names)}")
    contents = []
    for name, path in paths.items():
        try:
            contents.append(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(f"{name}: {path} cannot be read ({error.strerror})") from error
    cert, key, ca = contents
    _check_certificates(paths["vision_tls_cert"], paths["vision_tls_key"], paths["vision_tls_ca"])
    return grpc.ssl_server_credentials([(key, cert)], root_certificates=ca, require_client_auth=True)


def _check_certificates(cert: str, key: str, ca: str) -> None:
    """Have OpenSSL read them: gRPC would only say that it cannot listen."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key)
    except ssl.SSLError as error:
        raise ConfigError(
            f"vision_tls_cert, vision_tls_key: {cert} and {key} are not a certificate and its key ({error})"
        ) from error
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise ConfigError(f"vision_tls_ca: {ca} holds no certificates ({error})") from error


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call of every service that does not bring the token.

    Args:
        token: the shared secret.
    """

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

        async def refuse(_requests: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the vision service's token is missing or wrong")

        # As a stream: it answers without reading what the client sends.
        self._refusal: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Pass a call on, or the refusal instead."""
        for key, value in handler_call_details.invocation_metadata:
            given = value if isinstance(value, bytes) else value.encode()
            if key == TOKEN_KEY and hmac.compare_digest(given, self._expected):
                return await continuation(handler_call_details)
        return self._refusal


class UnixRelay:
    """Listens on a unix socket and lets the same user through to another one.

    Args:
        path: where to listen (mode 0600).
        target: gRPC's own socket.
        uid: whose processes are let through; by default this process's user.
    """

    def __init__(self, path: Path, target: Path, *, uid: int | None = None) -> None:
        self.path = path
        self._target = target
        self._uid = os.geteuid() if uid is None else uid
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def listen(self) -> None:
        """Listen and begin to accept.

        Raises:
            ConfigError: the path is taken by somebody who listens, or cannot be made.
        """
        self._listener = _bound(self.path)
        self._start(self._accept(self._listener))

    async def close(self) -> None:
        """Stop listening, end all connections and remove the socket."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self.path.unlink(missing_ok=True)
            self._listener.close()

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(listener)
            except OSError as error:
                # Out of file descriptors, most likely: wait until some are given back.
                logger.warning("%s: cannot accept a connection (%s)", self.path, error.strerror)
                await asyncio.sleep(0.1)
                continue
            if same_user(client, self._uid):
                self._start(self._relay(client))
            else:
                logger.warning("%s: refused a process of another user", self.path)
                client.close()

    async def _relay(self, client: socket.socket) -> None:
        """Pass bytes both ways until one side ends the connection."""
        loop = asyncio.get_running_loop()
        with client, socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):
            client.setblocking(False)
            server.setblocking(False)
            await loop.sock_connect(server, str(self._target))
            ways = [loop.create_task(_pass(client, server)), loop.create_task(_pass(server, client))]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)


async def _pass(source: socket.socket, target: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while count := await loop.sock_recv_into(source, buffer):
        await loop.sock_sendall(target, buffer[:count])


def private_socket(path: Path) -> Path:
    """Name gRPC's own socket behind the one at ``path``: beside it, so that it goes where that one goes."""
    return Path(f"{path}{_PRIVATE}")


@contextlib.contextmanager
def private_folder(path: Path) -> Iterator[Path]:
    """Make the folder of gRPC's own socket (mode 0700), yield the socket's path, and remove the folder in the end.

    Only for who listens at ``path``: what a killed process left is removed first.

    Raises:
        ConfigError: it cannot be made, or somebody else made it.
    """
    target = private_socket(path)
    folder = target.parent
    try:
        if folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.geteuid():
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(f"listen: cannot make {folder} ({error.strerror})") from error
    try:
        yield target
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _bound(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket() and not _answers(path):
            # Left behind by a process that was killed.
            path.unlink()
        # The socket's file takes over this mode, so there is no moment in which others could connect.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(f"listen: cannot listen on unix:{path} ({error.strerror})") from error
    listener.setblocking(False)
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def bind_tcp(server: grpc.aio.Server, address: TcpAddress, vision: VisionSettings) -> TcpAddress:
    """Let gRPC listen on a port and return the address with the port that it got.

    Raises:
        ConfigError: the port is taken or forbidden, or the host is not one of this machine.
    """
    secured = credentials(vision)
    try:
        if secured is None:
            port = server.add_insecure_port(str(address))
        else:
            port = server.add_secure_port(str(address), secured)
    except RuntimeError as error:
        raise ConfigError(f"listen: cannot listen on {address}: it is taken or not of this machine") from error
    return TcpAddress(address.host, port)


def interceptors(address: Address, vision: VisionSettings) -> list[grpc.aio.ServerInterceptor]:
    """Return what checks each call: the token, over TCP and if there is one."""
    token = _token(vision)
    return [TokenInterceptor(token)] if isinstance(address, TcpAddress) and token is not None else []
