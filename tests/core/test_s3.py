"""S3 is reached by the proxies that the environment names, and what these are told stays secret."""

from __future__ import annotations

import datetime
import pickle
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.storage import Location

PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")


class Proxy(StreamRequestHandler):
    """Notes what it is asked, and passes it on to `target`, whatever host is named."""

    rbufsize = 0  # what follows the head stays in the socket
    asked: list[str]
    target: tuple[str, int]

    def handle(self) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.rfile.read(1)
        self.asked.append(head.decode())
        with socket.create_connection(self.target) as there:
            if head.startswith(b"CONNECT"):
                self.connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                there.sendall(head)
            while ready := select.select([self.connection, there], [], [])[0]:
                for side in ready:
                    if not (some := side.recv(1 << 16)):
                        return
                    (there if side is self.connection else self.connection).sendall(some)


@pytest.fixture
def proxy_to(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], list[str]]]:
    """Starts a proxy to an address, which the environment names with a password; gives what it is asked."""
    servers = []

    def start(host: str, port: int) -> list[str]:
        handler = type("OwnProxy", (Proxy,), {"asked": [], "target": (host, port)})
        servers.append(ThreadingTCPServer(("127.0.0.1", 0), handler))
        servers[-1].daemon_threads = True
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        for name in PROXIES:
            monkeypatch.setenv(name, f"http://me:p%40ss@127.0.0.1:{servers[-1].server_address[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "")
        return handler.asked  # type: ignore[attr-defined, no-any-return]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def asked(s3_bucket: str, s3_server: str, proxy_to: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a proxy to the S3 server is asked, whose own name nobody but it knows."""
    host, _, port = s3_server.removeprefix("http://").partition(":")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://behind-the-proxy")
    return proxy_to(host, int(port))  # type: ignore[no-any-return]


def test_files_are_read_and_written_by_the_proxy_of_the_environment(asked: list[str], s3_bucket: str) -> None:
    place = Location.at(s3_bucket) / "a b" / "c.txt"
    place.write(b"hello")
    assert place.read() == b"hello"
    assert Location.at(s3_bucket).files() == {"a b/c.txt": 5}
    assert asked and all(" http://behind-the-proxy/bucket-" in head.partition("\r\n")[0] for head in asked)
    assert all("Proxy-Authorization: Basic bWU6cEBzcw==" in head for head in asked), "me:p@ss"


def test_hosts_that_need_no_proxy_are_asked_themselves(
    asked: list[str], s3_bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    (Location.at(s3_bucket) / "a").write(b"hello")
    assert (Location.at(s3_bucket) / "a").read() == b"hello"
    assert not asked


def test_options_of_the_uri_stay_beside_a_proxy(asked: list[str], s3_bucket: str, monkeypatch: Any) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    bucket = s3_bucket.removeprefix("s3://")
    place = Location.at(f"s3://test:test@{bucket}?endpoint_override=behind-the-proxy&scheme=http&region=eu-west-1")
    (place / "a").write(b"hello")
    assert (place / "a").read() == b"hello" and place.filesystem.region == "eu-west-1"
    assert all(head.partition("\r\n")[0].split()[1].startswith("http://behind-the-proxy/") for head in asked)


def test_a_file_system_that_is_sent_elsewhere_carries_no_password(
    asked: list[str], s3_bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (Location.at(s3_bucket) / "a").write(b"hello")
    there = Location.at(s3_bucket)
    sent = pickle.dumps(there.filesystem)
    assert b"p@ss" not in sent and b"p%40ss" not in sent
    for name in PROXIES:  # where it arrives, there is none
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    before = len(asked)
    assert pickle.loads(sent).open_input_stream(f"{there.path}/a").read() == b"hello"
    assert len(asked) == before


def test_ray_is_given_the_file_system_itself_behind_a_proxy(
    asked: list[str], s3_bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Location.at(s3_bucket) / "runs"
    path, filesystem = place.for_ray
    assert path == place.uri.removeprefix("s3://")
    filesystem.create_dir(path)
    assert len(asked) > 0
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "*")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    assert (Location.at(s3_bucket) / "runs").for_ray == (place.uri, None)


@pytest.mark.parametrize(
    ("proxy", "said"),
    [
        ("socks5://me:secret@proxy.invalid:1080", r"socks5://\*\*\*@proxy\.invalid:1080"),
        ("http://me:secret@proxy.invalid:99999", r"http://\*\*\*@proxy\.invalid:99999"),
        ("http://:80", "http://:80"),
    ],
)
def test_a_proxy_that_s3_cannot_take_is_refused_without_its_password(
    proxy: str, said: str, asked: list[str], s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in PROXIES:
        monkeypatch.setenv(name, proxy)
    with pytest.raises(ArtifactError, match=f"by the proxy {said}, and only proxies of http://HOST:PORT") as caught:
        Location.at(s3_bucket).exists()
    assert "secret" not in str(caught.value)


class Amazon(BaseHTTPRequestHandler):
    """Tells the region of one bucket, and lets nobody read it."""

    def do_HEAD(self) -> None:
        known = self.headers["Host"] == "data.s3.amazonaws.com"
        self.send_response(403 if known else 404)
        if known:
            self.send_header("x-amz-bucket-region", "eu-north-1")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def amazon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A server whose certificate says that it is Amazon's, and that Python trusts."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Amazon")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now.replace(year=9999))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("*.s3.amazonaws.com")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (tmp_path / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (tmp_path / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Amazon)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_region_of_a_bucket_is_asked_for_by_the_proxy(amazon: Any, proxy_to: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    asked = proxy_to(*amazon.server_address)
    assert Location.at("s3://data/runs").filesystem.region == "eu-north-1"
    assert asked[-1].startswith("CONNECT data.s3.amazonaws.com:443 ")
    with pytest.raises(ArtifactError, match=r"^s3://other: .*\(Amazon knows no bucket other\)"):
        Location.at("s3://other").exists()
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(ArtifactError, match=r"the proxy http://\*\*\*@127.* gave no answer.*\?region=NAME") as caught:
        Location.at("s3://data").exists()
    assert "p%40ss" not in str(caught.value)
    assert Location.at("s3://data?region=eu-west-1").filesystem.region == "eu-west-1"
