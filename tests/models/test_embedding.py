from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from raytune_ft.core.errors import ModelError
from raytune_ft.models import embedding
from raytune_ft.models.embedding import MAX_TOKENS, Embedder, load_embedder
from raytune_ft.models.fetching import check_sha256
from raytune_ft.models.size import parameter_count

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "green"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one-layer BERT of width 16 with a seven-word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    bare = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=300, **sizes)).save_pretrained(folder)
    return folder


def test_a_vector_is_the_mean_of_the_real_tokens_states_at_length_one(encoder: Path) -> None:
    embedder = load_embedder(str(encoder))
    vectors = embedder.embed(["red blue", "green", "red red green blue red"]).vectors
    with torch.inference_mode():
        states = embedder.model(torch.tensor([[2, 6, 3]])).last_hidden_state[0]
    mean = states.mean(0)
    np.testing.assert_allclose(vectors[1], (mean / mean.norm()).numpy(), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    alone = np.concatenate([embedder.embed([text]).vectors for text in ("red blue", "green", "red red green blue red")])
    np.testing.assert_allclose(vectors, alone, atol=1e-6)


def test_only_the_first_tokens_of_a_long_text_count_and_it_is_counted(encoder: Path) -> None:
    embedder = load_embedder(str(encoder))
    fitting, long = " ".join(["red"] * (MAX_TOKENS - 2)), " ".join(["red"] * (MAX_TOKENS - 2) + ["blue"] * 50)
    found = embedder.embed([fitting, long])
    assert found.cut == 1
    np.testing.assert_allclose(found.vectors[0], found.vectors[1], atol=1e-6)


def test_batches_stay_within_the_token_budget_and_lose_nothing() -> None:
    lengths = [5, 256, 3, 200, 256, 7] * 20
    groups = embedding._batches(lengths)
    assert sorted(place for group in groups for place in group) == list(range(120))
    assert all(len(group) * max(lengths[place] for place in group) <= embedding._TOKENS_AT_ONCE for group in groups)
    assert len(groups) == 3  # 60 of up to 7; 20 of 200 with 12 of 256 (32 x 256 = 8192); 28 of 256


def test_weights_with_another_checksum_are_refused(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"something else")
    with pytest.raises(ModelError, match=r"model.safetensors: its sha256 is .*, expected 53aa5117"):
        check_sha256(weights, embedding.WEIGHTS_SHA256)
    assert not weights.exists()


def test_an_unknown_name_and_a_folder_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="starter:mini: there is no such starter embedder; known: starter:all-minilm"):
        embedding.cached("starter:mini")
    with pytest.raises(ModelError, match="no embedder could be loaded"):
        load_embedder(str(tmp_path))


def test_parameters_are_counted_from_headers_and_agree_with_the_loaded_model(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    wanted = AutoModelForCausalLM.from_pretrained(tiny_model).num_parameters()
    assert parameter_count(str(tiny_model)) == wanted
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    assert parameter_count(str(tmp_path)) == wanted  # no weights: counted on an empty model
    header = json.dumps({"w": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(48))
    assert parameter_count(str(tmp_path)) == 12


@pytest.mark.real
def test_minilm_puts_sentences_of_one_meaning_together() -> None:
    embedder: Embedder = load_embedder()
    found = embedder.embed(
        ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."]
    )
    close, far = found.vectors[0] @ found.vectors[1], found.vectors[0] @ found.vectors[2]
    assert found.vectors.shape == (3, 384)
    assert close > 0.7
    assert far < 0.2
