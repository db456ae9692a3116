"""Storage of all kinds: the local disk, an S3 server that speaks HTTP on this machine (moto), Google's."""

import logging

import boto3
import pytest
from moto.server import ThreadedMotoServer


@pytest.fixture(scope="session")
def s3_server():
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line a request, else
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_server, monkeypatch, request, tmp_path):
    """An empty bucket of a real S3 server, reached as plain ``s3://`` URIs through the usual environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = "bucket-" + "".join(c if c.isalnum() else "-" for c in request.node.name.lower())[-40:].strip("-")
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(params=["local", "s3", "gs"])
def storage(request, tmp_path, monkeypatch):
    """A folder to put artifacts in: on the local disk, on S3, and on Google's storage."""
    if request.param == "local":
        return str(tmp_path / "storage")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return request.getfixturevalue(f"{request.param}_bucket") + "/runs"
