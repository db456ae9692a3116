"""vLLM behind Ray Serve, in the environment that `.ci/vllm-env` makes, and the `openai` client in this one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import torch

from raytune_ft import quickstart
from raytune_ft.compression.agreement import TEXT, next_token_logits, text_ids
from raytune_ft.compression.config import QuantizationConfig
from raytune_ft.compression.quantize import write_quantized
from raytune_ft.evaluation.forgetting import general_passages
from raytune_ft.models.config import Precision
from raytune_ft.models.loading import load_model
from raytune_ft.serving.address import free_port

PYTHON = os.environ.get("RAYTUNE_FT_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not PYTHON, reason="RAYTUNE_FT_VLLM_PYTHON names no interpreter (.ci/vllm-env DIR makes one)"),
]
STARTER = "starter:smollm2-135m"


@contextmanager
def served(model: str, log: Path, *settings: str) -> Iterator[openai.OpenAI]:
    """A client of ``raytune-ft serve`` in vLLM's environment."""
    port = free_port("127.0.0.1", 0)
    log.with_suffix(".yaml").write_text(f"model_path: {model}\nname: served\nport: {port}\nmax_batch_size: 4\n")
    program = "from raytune_ft.cli import main; main()"
    arguments = ["serve", str(log.with_suffix(".yaml")), *settings]
    # What a virtual environment's activation does: Ray's workers find the compiler's helpers by it.
    environment = {**os.environ, "PATH": f"{Path(PYTHON).parent}{os.pathsep}{os.environ['PATH']}"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [PYTHON, "-c", program, *arguments], stdout=out, stderr=subprocess.STDOUT, env=environment
        )
    try:
        deadline = time.monotonic() + 400
        while "Ctrl-C stops it" not in log.read_text():
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, log.read_text()[-4000:]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def answers_as_it_should(client: openai.OpenAI) -> tuple[str, str]:
    """What the other engine's tests ask, of a model that is not there, too; two answers, the second streamed."""
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = {"messages": question, "temperature": 0, "max_tokens": 12}
    assert [model.id for model in client.models.list()] == ["served"]
    whole = client.chat.completions.create(model="served", **asked)  # type: ignore[call-overload]
    assert whole.usage.completion_tokens > 0
    chunks = client.chat.completions.create(model="served", stream=True, **asked)  # type: ignore[call-overload]
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", **asked)  # type: ignore[call-overload]
    return whole.choices[0].message.content, streamed


def test_vllm_answers_the_openai_client(tmp_path: Path):
    with served(STARTER, tmp_path / "serve.log", "engine=vllm") as client:
        assert all("Paris" in answer for answer in answers_as_it_should(client))


def test_a_w8a8_model_of_ours_is_served_by_vllm_without_asking_for_it(tmp_path: Path):
    # Prose, and orders with their records: more tokens than a layer has inputs.
    orders = Path(quickstart.__file__).with_name("data").joinpath("orders.jsonl").read_text().splitlines()[:48]
    texts = [*(passage.text for passage in general_passages(None)), *orders]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = QuantizationConfig(
        method="compressed_tensors", bits=8, calibration_path=str(tmp_path / "rows.jsonl"), calibration_rows=64
    )
    made = write_quantized(STARTER, tmp_path / "small", config)
    # bitsandbytes' 8 bits come to 0.037 nats here; over so few positions the share of equal first tokens says less.
    assert made.agreement.kl < 0.05
    assert made.agreement.top1 > 0.85
    with served(str(tmp_path / "small"), tmp_path / "serve.log") as client:
        assert all(answers_as_it_should(client))  # how well it says it is measured: 8 bits may change a first word
        echoed = client.completions.create(model="served", prompt=TEXT, max_tokens=1, logprobs=1, echo=True)
    likelihoods = [value for value in echoed.choices[0].logprobs.token_logprobs[:-1] if value is not None]
    loaded = load_model(STARTER, precision=Precision.FP32, device="cpu")
    ids = text_ids(loaded.tokenizer, None)
    logits = next_token_logits(loaded.model, ids)[:-1]
    right = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert len(likelihoods) == len(right)
    assert sum(likelihoods) / len(right) == pytest.approx(float(right.mean()), abs=0.1)
    assert "Engine vllm: it serves this format" in (tmp_path / "serve.log").read_text()
