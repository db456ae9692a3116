"""Small real things that all tests share: a two-layer model with a tokenizer, a local Ray cluster, Google's storage."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .browser import chromium
from .wandb_runs import offline_wandb

__all__ = ["chromium", "offline_wandb"]

# Tiny models gain nothing from more threads, and spinning ones stall each other where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For ``-n 2``: files that need Ray make two groups, each in one process and on one cluster; the others go by file.

    pytest-xdist's marks for groups have no effect here: it renames tests by an attribute that pytest 9.2 lacks.
    """
    from xdist.scheduler import LoadScopeScheduling

    class RayByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if not needs_ray(config.rootpath / file):
                return file
            return "ray beside" if file.startswith(BESIDE) else "ray"

    return RayByGroup(config, log)


BESIDE = ("tests/core/", "tests/data/", "tests/evaluation/", "tests/jobs/", "tests/serving/")
"""Folders whose tests with Ray take about as long as the others', less those without Ray."""


@functools.cache  # asked for each test, at the start and whenever one ends
def needs_ray(file: Path) -> bool:
    text = file.read_text().replace("pytest.mark.ray  # no Ray", "")
    return "ray_cluster" in text or "pytest.mark.ray" in text


WORDS = """The quick brown fox jumps over the lazy dog. user assistant system name city colour quantity answer order
What is the capital of France? Paris. 0 1 2 3 4 5 6 7 8 9 { } [ ] " : , yes no red blue green
Turn the text into JSON."""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(folder: Path, *, layers: int = 2, seed: int = 0) -> Path:
    """A random Llama with `layers` layers of width 64, its byte-level tokenizer and a ChatML template, in `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    bare.train_from_iterator(
        [WORDS],
        trainers.BpeTrainer(
            vocab_size=384, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the tiny model."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[object]:
    """A local Ray cluster with two logical CPUs, stopped at the end of the session."""
    from raytune_ft.core import cluster

    connected = cluster.connect(num_cpus=2)
    yield connected
    cluster.disconnect()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], object]]]:
    """A file system of 3 MiB, with a way to make it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    subprocess.run(["umount", disk], check=True)


GOOGLE_STORAGE = """
from gcp_storage_emulator.server import create_server
server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
server.start()
print(server._api._httpd.server_port, flush=True)
"""


@pytest.fixture(scope="session")
def google_storage() -> Iterator[str]:
    """A server on this machine that speaks as Google's storage does; pyarrow waits for it with Python's lock held."""
    process = subprocess.Popen([sys.executable, "-c", GOOGLE_STORAGE], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    process.kill()
    process.wait()


@pytest.fixture
def gs_bucket(google_storage: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket of Google's storage, reached as plain ``gs://``."""
    urllib.request.urlopen(f"{google_storage}/wipe?keep-buckets=true").close()
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", google_storage)
    return "gs://anonymous@bucket"


def order(number: int) -> dict[str, object]:
    """A record of a customer who orders something, with the JSON that is to be answered."""
    colour, city = ("red", "blue", "green")[number % 3], ("Paris", "Rome")[number % 2]
    answer = {"colour": colour, "city": city, "quantity": number}
    return {
        "messages": [
            {"role": "user", "content": f"order {number} {colour} for {city}"},
            {"role": "assistant", "content": json.dumps(answer)},
        ]
    }


@pytest.fixture(scope="session")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file with 24 records."""
    path = tmp_path_factory.mktemp("orders") / "orders.jsonl"
    path.write_text("".join(json.dumps(order(n)) + "\n" for n in range(24)), encoding="utf-8")
    return path
