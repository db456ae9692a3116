"""The metric reward: a reward model's scores of the answers, as plain transformers gives them."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
import torch

from raytune_ft.core.errors import ConfigError, DataError, ModelError
from raytune_ft.core.records import Message
from raytune_ft.evaluation.config import EvaluationConfig
from raytune_ft.evaluation.rewards import Judged, conversation_ids, rewards_of
from raytune_ft.evaluation.run import ModelEvaluator
from raytune_ft.models.chat import Chat
from raytune_ft.models.config import Precision
from raytune_ft.models.loading import load_tokenizer
from raytune_ft.models.references import refuse_writer, resolve_model

ASKED = (Message("user", "order 2 red"),)


@pytest.fixture(scope="module")
def judge(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of random values."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("judge") / "model"
    torch.manual_seed(3)
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def score(judge: Path, ids: list[int]) -> float:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(judge, dtype=torch.float32).eval()
    return float(model(torch.tensor([ids])).logits[0, 0].detach())


def test_rewards_are_those_of_plain_transformers(judge: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(judge)
    answers = ["yes", "no no no no", ""]
    found = rewards_of(str(judge), Precision.FP32, [[Judged(ASKED, answer)] for answer in answers])
    for answer, reward in zip(answers, found, strict=True):
        turns = [{"role": "user", "content": "order 2 red"}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        assert reward == pytest.approx(score(judge, tokenizer(text, add_special_tokens=False).input_ids), abs=1e-5)
    assert len({round(reward, 4) for reward in found}) == 3


def test_a_cut_off_answer_is_judged_without_what_would_end_it(judge: Path) -> None:
    chat = Chat(load_tokenizer(str(judge)))
    ended, cut = (conversation_ids(chat, Judged(ASKED, "yes", cut_off=cut)) for cut in (False, True))
    assert chat.tokenizer.decode(ended).endswith("assistant\nyes<|im_end|>\n")
    assert chat.tokenizer.decode(cut).endswith("assistant\nyes")


def test_what_cannot_be_judged_is_named(judge: Path, tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"reward_model_path: .*writes text"):
        refuse_writer(resolve_model(str(tiny_model)))
    with pytest.raises(DataError, match=r"has \d+ tokens, and the reward model .* takes 512"):
        rewards_of(str(judge), Precision.FP32, [[Judged(ASKED, "yes " * 600)]])
    for settings in ({"metrics": ["reward"]}, {"metrics": ["exact_match"], "reward_model_path": str(judge)}):
        with pytest.raises(ConfigError, match="belong together"):
            EvaluationConfig(model_path=str(tiny_model), dataset_path="d", **settings)


@pytest.mark.ray
def test_a_report_has_the_reward_of_each_answer(ray_cluster, judge: Path, tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"order {n} red"}]} for n in range(6)]  # no right answer
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model_path": str(tiny_model), "dataset_path": str(tmp_path / "test.jsonl"), "precision": "fp32"}
    paths = {"reward_model_path": str(judge), "output_dir": str(tmp_path / "report")}
    evaluator = ModelEvaluator(
        EvaluationConfig(**settings, **paths, metrics=["reward"], decoding={"max_new_tokens": 8})
    )
    (model,) = evaluator.evaluate().models
    chat = Chat(load_tokenizer(str(judge)))
    for answer in model.answers:
        asked = (Message("user", answer.prompt),)
        ids = conversation_ids(chat, Judged(asked, answer.answer or "", answer.finish_reason == "length"))
        assert answer.scores["reward"] == answer.reward == pytest.approx(score(judge, ids), abs=1e-5)
    assert model.values["reward"] == pytest.approx(fmean(answer.reward for answer in model.answers))
    low, high = model.intervals["reward"]
    assert low < model.values["reward"] < high
    assert "reward model" in [parent.role for parent in evaluator.artifact.manifest.parents]
    assert "mean score that the reward model of the settings gives" in (tmp_path / "report/report.html").read_text()
