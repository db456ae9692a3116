"""Sources on other machines: servers of S3, of Google's storage and of the web, all real and on this one."""

from __future__ import annotations

import gzip
import logging
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from moto.server import ThreadedMotoServer

from raytune_ft.core.errors import DataError
from raytune_ft.core.storage import Location
from raytune_ft.data.readers import read_rows
from raytune_ft.data.sources import find_files, source_parents

LINES = b'{"text": "a"}\n{"text": "b"}\n'
ROWS = [{"text": "a"}, {"text": "b"}]


def fill(folder: Path) -> None:
    (folder / "d").mkdir()
    (folder / "d/a.jsonl").write_bytes(LINES)
    (folder / "d/a.jsonl.gz").write_bytes(gzip.compress(LINES))
    (folder / "d/a.json").write_bytes(b'[{"text": "a"}, {"text": "b"}]')
    (folder / "d/empty.jsonl").touch()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "d/a.parquet")


def rows_of(source: str) -> list[object]:
    return [row.values for file in find_files([source]) for row in read_rows(file)]


class Site(SimpleHTTPRequestHandler):
    """Serves files, with ranges under /ranges, and answers every method by a status under /status/NUMBER."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/status/"):
            self.send_error(int(path.split("/")[2]))
            return
        file = Path(self.directory) / path.removeprefix("/ranges/").lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        data, wanted = file.read_bytes(), self.headers.get("Range")
        if wanted and path.startswith("/ranges/"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            total, data = len(data), data[int(first) : int(last or len(data)) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{total}")
        else:
            self.send_response(200)
            if not path.startswith("/ranges/"):
                self.send_header("Accept-Ranges", "none")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    fill(tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Site, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.jsonl?token=secret", "a.jsonl.gz?v=1"])
@pytest.mark.parametrize("base", ["", "/ranges"])
def test_files_of_a_web_server_are_sources(site: str, base: str, name: str) -> None:
    assert rows_of(f"{site}{base}/d/{name}") == ROWS


def test_parquet_of_a_web_server_is_read_by_ranges_or_it_is_said_why_not(site: str) -> None:
    assert rows_of(f"{site}/ranges/d/a.parquet") == ROWS
    with pytest.raises(DataError, match=r"/d/a.parquet: its server gives no ranges of files; download it"):
        rows_of(f"{site}/d/a.parquet")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("d/gone.jsonl", "/d/gone.jsonl: there is no such file"),
        ("status/403/a.jsonl", "/status/403/a.jsonl: no permission to read"),
        ("status/401/a.jsonl?token=secret", "/status/401/a.jsonl: no permission to read"),
        ("status/500/a.jsonl", "/status/500/a.jsonl: the storage refused: 500"),
        ("d/empty.jsonl", "/d/empty.jsonl: is empty"),
        ("d/*.jsonl", "there is no such file"),
        ("d/a.html", "there is no such file"),
    ],
)
def test_what_a_web_server_refuses_is_said_without_its_secrets(site: str, path: str, message: str) -> None:
    with pytest.raises(DataError, match=message.replace("*", r"\*")) as caught:
        find_files([f"{site}/{path}"])
    assert "secret" not in str(caught.value)


class Proxy(SimpleHTTPRequestHandler):
    """Keeps what it is asked, fetches it (whatever host is named) from the site that its directory is, and refuses
    tunnels."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.forward()

    def do_GET(self) -> None:
        self.forward()

    def do_CONNECT(self) -> None:
        self.asked.append(f"CONNECT {self.path}")
        self.send_error(403)

    def forward(self) -> None:
        self.asked.append(self.path)
        path = self.path.partition("://")[2].partition("/")[2]
        found = requests.request(self.command, f"{self.directory}/{path}", timeout=10)
        self.send_response(found.status_code)
        self.send_header("Content-Length", found.headers["Content-Length"])
        self.end_headers()
        self.wfile.write(found.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy(site: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a proxy that the environment names was asked; it serves the files of `site` as those of any host."""
    asked: list[str] = []
    handler = type("OwnProxy", (Proxy,), {"asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=site))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    yield asked
    server.shutdown()
    server.server_close()


def test_the_proxies_of_the_environment_are_asked(site: str, proxy: list[str]) -> None:
    assert rows_of("http://data.invalid/d/a.jsonl") == ROWS
    assert set(proxy) == {"http://data.invalid/d/a.jsonl"}
    with pytest.raises(DataError, match=r"https://data\.invalid/a\.jsonl: no permission"):
        rows_of("https://data.invalid/a.jsonl")
    assert proxy[-1] == "CONNECT data.invalid:443"
    asked = len(proxy)
    assert rows_of(f"{site}/d/a.jsonl") == ROWS  # NO_PROXY names its host
    assert len(proxy) == asked


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/a\.jsonl: the storage refused: "):
        find_files(["http://127.0.0.1:9/a.jsonl"])


def test_the_digest_of_a_web_file_changes_with_its_content(site: str, tmp_path: Path) -> None:
    source = f"{site}/d/a.jsonl"
    before = source_parents([source], "source")
    assert source_parents([source], "source") == before
    (tmp_path / "d/a.jsonl").write_bytes(LINES[:14])
    assert source_parents([source], "source")[0].digest != before[0].digest


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    fill(tmp_path)
    client = boto3.client("s3", endpoint_url=s3_server)
    client.create_bucket(Bucket="data")
    for path in (tmp_path / "d").iterdir():
        client.upload_file(str(path), "data", f"d/{path.name}")
    return "s3://data"


def objects_folders_and_globs_are_sources(bucket: str) -> None:
    for name in (
        "a.jsonl",
        "a.jsonl.gz",
        "a.json",
        "a.parquet",
    ):
        assert rows_of(f"{bucket}/d/{name}") == ROWS
    assert [f.kind for f in find_files([f"{bucket}/d"])] == ["json", "jsonl", "jsonl", "parquet"]
    assert [f.kind for f in find_files([f"{bucket}/d/*.jsonl*"])] == ["jsonl", "jsonl"]
    assert [f.kind for f in find_files([f"{bucket}/**.parquet"])] == ["parquet"]


def test_objects_folders_and_globs_of_s3_are_sources(bucket: str) -> None:
    objects_folders_and_globs_are_sources(bucket)
    assert rows_of(f"{bucket}/d/a.parquet?region=us-east-1") == ROWS
    assert [f.kind for f in find_files([f"{bucket}/**.parquet?region=us-east-1"])] == ["parquet"]


def test_objects_may_be_called_anything(bucket: str) -> None:
    names = ["läufe 1/a b.jsonl", "läufe 1/50%#1?.jsonl"]
    for name in names:
        (Location.at(bucket) / "odd" / name).write((Location.at(bucket) / "d" / "a.jsonl").read())
    for source in (
        f"{bucket}/odd",
        f"{bucket}/odd/läufe 1",
        f"{bucket}/odd/läufe 1/*.jsonl",
        f"{bucket}/odd/l%C3%A4*/*",
    ):
        assert rows_of(source) == [*ROWS, *ROWS]


def test_objects_folders_and_globs_of_googles_storage_are_sources(gs_bucket: str, tmp_path: Path) -> None:
    fill(tmp_path)
    (Location.at(gs_bucket) / "d").upload(tmp_path / "d")
    objects_folders_and_globs_are_sources(gs_bucket)


def test_an_object_store_without_rights_is_said_so(bucket: str, s3_server: str) -> None:
    requests.post(f"{s3_server}/moto-api/reset-auth", data="0", timeout=10)  # from here on rights are checked
    try:
        with pytest.raises(DataError, match=r"^s3://data/d/a\.jsonl: no permission to read or write here; check"):
            find_files([f"{bucket}/d/a.jsonl"])
    finally:
        requests.post(f"{s3_server}/moto-api/reset-auth", data="inf", timeout=10)


def test_google_storage_without_a_reply_ends_with_its_name() -> None:
    options = "endpoint_override=127.0.0.1:9&scheme=http&retry_limit_seconds=1"
    with pytest.raises(DataError, match=r"^gs://anonymous@bucket/a\.jsonl: the storage refused: .*[Cc]onnect"):
        find_files([f"gs://anonymous@bucket/a.jsonl?{options}"])
