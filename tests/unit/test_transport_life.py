"""Listening, draining and health, on both transports and both event loops."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc.server.health import Health
from extproc.server.transport import Method, MutualTls, Session, Shape, TcpAddress
from tests.transports import BIDI, KINDS, Calls, Served, bidi, served, unary

NGH2 = [kind for kind in KINDS if kind.startswith("ngh2")]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def until(fact: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not fact():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.005)


def code_of(call: Callable[[], Any]) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


# Draining


def test_drain_lets_open_streams_end_and_takes_no_new_ones(kind: str, tmp_path: Path) -> None:
    with served(kind, tmp_path / "t.sock") as server, grpc.insecure_channel(server.target) as channel:
        call = bidi(channel)(iter([b"wait"]))
        until(lambda: bool(server.calls.waiting))
        draining = asyncio.run_coroutine_threadsafe(server.transport.drain(20.0), server.loop)
        with grpc.insecure_channel(server.target) as another:
            until(lambda: code_of(lambda: unary(another)(b"new", timeout=2)) is grpc.StatusCode.UNAVAILABLE)
        assert code_of(lambda: unary(channel)(b"new", timeout=2)) is grpc.StatusCode.UNAVAILABLE
        assert not draining.done()
        server.let_go()
        assert list(call) == [b"wait", b"finished"]
        draining.result(5)


def test_drain_cuts_what_is_left_after_the_grace(kind: str, tmp_path: Path) -> None:
    with served(kind, tmp_path / "t.sock") as server, grpc.insecure_channel(server.target) as channel:
        call = bidi(channel)(iter([b"wait"]))
        until(lambda: bool(server.calls.waiting))
        began = time.monotonic()
        server.run(server.transport.drain(0.3))
        assert 0.25 < time.monotonic() - began < 3.0
        assert code_of(lambda: list(call)) in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        until(lambda: server.calls.cancelled == 1)


def test_drain_without_streams_does_not_wait_for_the_grace(kind: str, tmp_path: Path) -> None:
    with served(kind, tmp_path / "t.sock") as server, grpc.insecure_channel(server.target) as channel:
        assert unary(channel)(b"a") == b"A"
        began = time.monotonic()
        server.run(server.transport.drain(20.0))
        assert time.monotonic() - began < 5.0


@pytest.mark.parametrize("kind", NGH2)
def test_no_call_fails_that_crosses_the_notice_of_a_drain(kind: str, tmp_path: Path) -> None:
    """Clients that go on to the next worker when told to lose nothing: streams on their way are still served."""
    listener = _listening(tmp_path / "t.sock")
    listener.setblocking(True)
    failures: list[grpc.RpcError] = []
    with served(kind, listener.dup()) as first, grpc.insecure_channel(first.target) as channel:
        stop = threading.Event()

        def call_on() -> None:
            while not stop.is_set():
                try:
                    assert list(bidi(channel)(iter([b"a", b"done"]), timeout=5)) == [b"a", b"done"]
                except grpc.RpcError as error:
                    failures.append(error)

        threads = [threading.Thread(target=call_on) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        with served(kind, listener.dup()):
            first.run(first.transport.drain(10.0))
            time.sleep(0.3)
            stop.set()
            for thread in threads:
                thread.join()
    assert failures == []


# Listening


def _listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o640)
    listener.listen(64)
    return listener


def test_a_socket_that_listens_already_is_served(kind: str, tmp_path: Path) -> None:
    listener = _listening(tmp_path / "t.sock")
    with served(kind, listener) as server, grpc.insecure_channel(server.target) as channel:
        assert unary(channel)(b"a") == b"A"


@pytest.mark.parametrize("kind", NGH2)
def test_a_given_socket_keeps_its_file_and_its_queue_when_the_worker_ends(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    parents = _listening(path)
    inode = path.stat().st_ino
    with served(kind, parents.dup()):
        pass
    assert path.stat().st_ino == inode
    assert path.stat().st_mode & 0o777 == 0o640
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as waits:
        waits.connect(str(path))
        with served(kind, parents.dup()) as server, grpc.insecure_channel(server.target) as channel:
            assert unary(channel)(b"a") == b"A"
            waits.settimeout(5)
            waits.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
            assert waits.recv(9)[3] == 4


def test_a_socket_file_that_was_left_behind_is_replaced(kind: str, tmp_path: Path) -> None:
    _listening(tmp_path / "t.sock").close()
    with served(kind, tmp_path / "t.sock") as server, grpc.insecure_channel(server.target) as channel:
        assert unary(channel)(b"a") == b"A"


def test_a_place_that_can_not_be_bound_is_an_os_error(kind: str, tmp_path: Path) -> None:
    with pytest.raises(OSError), served(kind, tmp_path / "missing" / "t.sock"):
        pass


# TLS


class Certificates:
    """A server's and a client's certificate of one authority, and a client's of another."""

    def __init__(self, folder: Path) -> None:
        self.ca, other = trustme.CA(), trustme.CA()
        self.server = self._pem(folder / "server", self.ca.issue_cert("127.0.0.1", "localhost"))
        self.client = self.ca.issue_cert("envoy@gateway.example")
        self.stranger = other.issue_cert("envoy@gateway.example")
        self.ca_pem = self.ca.cert_pem.bytes()
        (folder / "ca.pem").write_bytes(self.ca_pem)
        self.tls = MutualTls(self.server[0], self.server[1], folder / "ca.pem")

    @staticmethod
    def _pem(at: Path, leaf: trustme.LeafCert) -> tuple[Path, Path]:
        certificate, key = at.with_suffix(".pem"), at.with_suffix(".key")
        certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        key.write_bytes(leaf.private_key_pem.bytes())
        return certificate, key

    def credentials(self, client: trustme.LeafCert | None) -> grpc.ChannelCredentials:
        if client is None:
            return grpc.ssl_channel_credentials(self.ca_pem)
        chain = b"".join(blob.bytes() for blob in client.cert_chain_pems)
        return grpc.ssl_channel_credentials(self.ca_pem, client.private_key_pem.bytes(), chain)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


def _address(certificates: Certificates) -> TcpAddress:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return TcpAddress("127.0.0.1", free.getsockname()[1], certificates.tls)


def test_over_tcp_a_client_with_a_certificate_is_served(kind: str, certificates: Certificates) -> None:
    with (
        served(kind, _address(certificates)) as server,
        grpc.secure_channel(server.target, certificates.credentials(certificates.client)) as channel,
    ):
        sent = [bytes(1 << 20), b"sleep", b"done"]
        assert list(bidi(channel)(iter(sent))) == sent


def test_over_tcp_a_client_without_our_certificate_is_not_served(kind: str, certificates: Certificates) -> None:
    with served(kind, _address(certificates)) as server:
        for client in (None, certificates.stranger):
            with grpc.secure_channel(server.target, certificates.credentials(client)) as channel:
                assert code_of(lambda: unary(channel)(b"a", timeout=3)) is grpc.StatusCode.UNAVAILABLE
        with grpc.insecure_channel(server.target) as channel:
            assert code_of(lambda: unary(channel)(b"a", timeout=3)) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("kind", NGH2)
@pytest.mark.parametrize("protocols", [[], ["http/1.1"]])
def test_over_tcp_a_client_that_does_not_agree_on_h2_is_cut_off(
    kind: str, certificates: Certificates, protocols: list[str], tmp_path: Path
) -> None:
    context = ssl.create_default_context(cadata=certificates.ca_pem.decode())
    pem, key = certificates._pem(tmp_path / "client", certificates.client)
    context.load_cert_chain(pem, key)
    if protocols:
        context.set_alpn_protocols(protocols)
    address = _address(certificates)
    with served(kind, address), socket.create_connection((address.host, address.port), timeout=5) as raw:
        try:
            with context.wrap_socket(raw, server_hostname="localhost") as connected:
                assert connected.recv(1) == b""
        except (ConnectionError, ssl.SSLError):
            pass


def test_a_certificate_that_can_not_be_read_is_an_os_error(kind: str, tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    with pytest.raises(OSError), served(kind, TcpAddress("127.0.0.1", 1, MutualTls(missing, missing, missing))):
        pass


# Keepalive


@pytest.mark.parametrize("kind", NGH2)
def test_a_peer_that_stops_answering_is_cut_off_and_one_that_is_only_idle_is_not(kind: str, tmp_path: Path) -> None:
    with (
        served(kind, tmp_path / "t.sock", ping_every_s=0.1) as server,
        grpc.insecure_channel(server.target) as channel,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as mute,
    ):
        states: list[grpc.ChannelConnectivity] = []
        talk = bidi(channel)(iter([b"wait"]))
        channel.subscribe(states.append)
        mute.connect(server.target.removeprefix("unix:"))
        mute.settimeout(5)
        heard = b""
        while chunk := mute.recv(4096):
            heard += chunk
        assert b"\x00\x00\x08\x06\x00\x00\x00\x00\x00" in heard, "it was pinged before"
        server.let_go()
        assert list(talk) == [b"wait", b"finished"]
        assert grpc.ChannelConnectivity.TRANSIENT_FAILURE not in states


# Health


@pytest.fixture
def checked(kind: str, tmp_path: Path) -> Iterator[tuple[Served, Health, Any]]:
    calls = Calls()
    health = Health([Method(BIDI, Shape.BIDI, _never)])
    with (
        served(kind, tmp_path / "t.sock", health.methods(), calls) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        yield server, health, health_pb2_grpc.HealthStub(channel)


def _never(_: object) -> Session:
    raise AssertionError


def _request(service: str = "") -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


def test_check_tells_of_the_process_and_of_each_service(checked: tuple[Served, Health, Any]) -> None:
    server, health, stub = checked
    for service in ("", "test.Calls"):
        assert stub.Check(_request(service)).status == health_pb2.HealthCheckResponse.SERVING
    assert code_of(lambda: stub.Check(_request("other"))) is grpc.StatusCode.NOT_FOUND
    server.loop.call_soon_threadsafe(health.stop)
    until(lambda: stub.Check(_request()).status == health_pb2.HealthCheckResponse.NOT_SERVING)


def test_a_watcher_hears_of_the_end_and_does_not_hold_it_up(checked: tuple[Served, Health, Any]) -> None:
    server, health, stub = checked
    watching, other = stub.Watch(_request()), stub.Watch(_request("other"))
    assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
    assert next(other).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    server.loop.call_soon_threadsafe(health.stop)
    assert [answer.status for answer in watching] == [health_pb2.HealthCheckResponse.NOT_SERVING]
    assert list(other) == []
    began = time.monotonic()
    server.run(server.transport.drain(20.0))
    assert time.monotonic() - began < 5.0


def test_a_check_that_is_no_message_of_its_kind_fails_alone(checked: tuple[Served, Health, Any]) -> None:
    server, _, stub = checked
    with grpc.insecure_channel(server.target) as channel:
        assert code_of(lambda: unary(channel, "/grpc.health.v1.Health/Check")(b"\xff\xff")) is grpc.StatusCode.INTERNAL
    assert stub.Check(_request()).status == health_pb2.HealthCheckResponse.SERVING
