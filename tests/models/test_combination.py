"""Several adapters on one base: side by side they are what each is alone; combined, their weighted sum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from raytune_ft import cli
from raytune_ft.core.artifacts import open_artifact
from raytune_ft.core.errors import ArtifactError, ModelError
from raytune_ft.models.adapters import add_lora, add_virtual_tokens, save_adapter
from raytune_ft.models.combination import combine_adapters, load_adapters
from raytune_ft.models.derived import combine, merge
from raytune_ft.models.loading import load_model

IDS = torch.arange(5, 15).unsqueeze(0)


def lora(base: Path, folder: Path, *, rank: int = 4, seed: int = 0, **options: Any) -> str:
    loaded = load_model(str(base))
    shape = {"rank": rank, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj", "up_proj"], **options}
    model = add_lora(loaded.model, **shape, seed=seed, base=str(base))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    save_adapter(model, loaded.tokenizer, folder)
    return str(folder)


def virtual(base: Path, folder: Path, kind: Any) -> str:
    loaded = load_model(str(base))
    save_adapter(add_virtual_tokens(loaded.model, kind=kind, count=3, seed=0, base=str(base)), loaded.tokenizer, folder)
    return str(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def summed(base: Path, parts: list[tuple[str, float]]) -> torch.Tensor:
    """Logits of the base with each weight changed by the weighted products, computed from the files alone."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    for path, weight in parts:
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
        tensors = load_file(Path(path) / "adapter_model.safetensors")
        for name in [name for name in tensors if "lora_A" in name]:
            product = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
            target = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            with torch.no_grad():
                model.get_submodule(target).weight.add_(weight * scale * product)
    return logits(model.eval())


def test_adapters_side_by_side_answer_as_each_alone(tiny_model: Path, tmp_path: Path) -> None:
    paths = {"one": lora(tiny_model, tmp_path / "a"), "two": lora(tiny_model, tmp_path / "b", rank=2, seed=1)}
    together = load_adapters(paths, device="cpu")
    for name in ("one", "two", "one"):
        together.model.set_adapter(name)
        assert torch.equal(logits(together.model), logits(load_model(paths[name]).model))
    prompts = {kind: virtual(tiny_model, tmp_path / kind, kind) for kind in ("prompt_tuning", "prefix_tuning")}
    with pytest.raises(ModelError, match="cannot be side by side"):
        load_adapters({**paths, **prompts})


@pytest.mark.parametrize("rslora", [False, True])
def test_cat_is_the_weighted_sum_and_svd_of_full_rank_too(rslora: bool, tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    parts = [
        (lora(tiny_model, tmp_path / "a", use_rslora=rslora), 0.7),
        (lora(tiny_model, tmp_path / "b", rank=2, seed=1), -0.4),
    ]
    paths, weights = zip(*parts, strict=True)
    expected = summed(tiny_model, parts)
    for kind, rank in (("cat", None), ("svd", 6)):
        combine_adapters(paths, weights, tmp_path / kind, kind, rank=rank)
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / kind).eval()
        assert torch.allclose(logits(plain), expected, atol=1e-5), kind
        assert torch.allclose(logits(load_model(str(tmp_path / kind)).model), expected, atol=1e-5), kind
    assert not torch.allclose(logits(load_model(paths[0]).model), expected, atol=1e-2)


def test_linear_sums_the_factors_by_the_roots_of_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    paths = [lora(tiny_model, tmp_path / "a"), lora(tiny_model, tmp_path / "b", seed=1)]
    combine_adapters(paths, [0.25, 0.5], tmp_path / "sum", "linear")
    first, second, result = (load_file(Path(p) / "adapter_model.safetensors") for p in (*paths, tmp_path / "sum"))
    for name, tensor in result.items():  # scaling is 8 / 4
        assert torch.allclose(tensor, (0.25 * 2) ** 0.5 * first[name] + (0.5 * 2) ** 0.5 * second[name], atol=1e-6)


def test_what_has_no_sum_is_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    plain, other = lora(tiny_model, tmp_path / "a"), lora(tiny_model, tmp_path / "b", rank=2)
    dora = lora(tiny_model, tmp_path / "dora", use_dora=True)
    prefix, prompt = (virtual(tiny_model, tmp_path / kind, kind) for kind in ("prefix_tuning", "prompt_tuning"))
    for paths, words in (
        ([plain, dora], "DoRA also rescales"),
        ([prefix, prefix], "PREFIX_TUNING; only LoRA"),
        ([prompt, prompt], "PROMPT_TUNING; only LoRA"),
        ([plain, str(tiny_model)], "whole model, not an adapter"),
    ):
        with pytest.raises(ModelError, match=words):
            combine_adapters(paths, [1, 1], tmp_path / "out")
    with pytest.raises(ModelError, match=r"equal ranks, these are \[2, 4\]; take cat or svd"):
        combine_adapters([plain, other], [1, 1], tmp_path / "out", "linear")
    with pytest.raises(ModelError, match="a weight for each"):
        combine_adapters([plain, other], [1], tmp_path / "out")
    with pytest.raises(ModelError, match="only svd takes one"):
        combine_adapters([plain, other], [1, 1], tmp_path / "out", rank=2)
    with pytest.raises(ModelError, match=r"weights must be finite numbers \(got .*=nan\)"):
        combine_adapters([plain, other], [1, float("nan")], tmp_path / "out")
    with pytest.raises(ModelError, match="weights are all 0, which leaves the base alone"):
        combine_adapters([plain, other], [0, 0], tmp_path / "out")
    for rank, words in ((0, "at least 1"), (1000, r"at most \d+, the width of the narrowest layer")):
        with pytest.raises(ModelError, match=words):
            combine_adapters([plain, other], [1, 1], tmp_path / "out", "svd", rank=rank)
    assert not (tmp_path / "out").exists()


def test_adapters_of_two_bases_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.nn.init.zeros_(other.model.norm.weight)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "other")
    paths = {"one": lora(tiny_model, tmp_path / "a"), "two": lora(tmp_path / "other", tmp_path / "b")}
    with pytest.raises(ModelError, match="only on the same base"):
        load_adapters(paths)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_a_merged_adapter_is_an_artifact_that_answers_alike(options: dict, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = lora(tiny_model, tmp_path / "a", **options)
    artifact = merge(path, str(tmp_path / "merged"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits(plain), logits(load_model(path).model), atol=1e-5)
    assert merge(path, str(tmp_path / "merged")).digest == artifact.digest
    with pytest.raises(ModelError, match="is a whole model, not an adapter"):
        merge(str(tmp_path / "merged"), str(tmp_path / "again"))
    for nothing in ("nope", "org/nope"):
        with pytest.raises(ModelError, match=f"{nothing}: there is no such adapter folder; .*downloaded first"):
            merge(nothing, str(tmp_path / "again"))
    with pytest.raises(ArtifactError, match="only read"):
        merge(path, f"{path}/merged")


def test_a_merge_that_answers_otherwise_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    loaded = load_model(str(tiny_model))
    loaded.model.config.tie_word_embeddings = True
    loaded.model.tie_weights()
    for part in (loaded.model, loaded.tokenizer):
        part.save_pretrained(tmp_path / "tied")
    path = lora(tmp_path / "tied", tmp_path / "a", target_modules=["lm_head"])
    with pytest.raises(ModelError, match=r"the merged model's logits differ .* \(a head with the embeddings\); serve"):
        merge(path, str(tmp_path / "merged"))
    assert not (tmp_path / "merged/manifest.json").exists()


@pytest.mark.parametrize("kind", ["prefix_tuning", "prompt_tuning"])
def test_virtual_tokens_have_no_merge(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{kind.upper()} adds virtual tokens, not weights"):
        merge(virtual(tiny_model, tmp_path / kind, kind), str(tmp_path / "merged"))


def test_the_command_line_merges_and_combines(tiny_model: Path, tmp_path: Path) -> None:
    one, two = lora(tiny_model, tmp_path / "a"), lora(tiny_model, tmp_path / "b", seed=1)
    both, merged = str(tmp_path / "both"), str(tmp_path / "merged")
    done = CliRunner().invoke(cli.app, ["combine", both, f"{one}=0.5", f"{two}=-1"])
    assert done.exit_code == 0, done.output
    assert CliRunner().invoke(cli.app, ["merge", both, merged]).exit_code == 0
    plain = load_model(merged).model
    assert torch.allclose(logits(plain), summed(tiny_model, [(one, 0.5), (two, -1)]), atol=1e-5)
    assert [parent.role for parent in open_artifact(both).manifest.parents] == ["adapter 1", "adapter 2"]
    wrong = CliRunner().invoke(cli.app, ["combine", both, one])
    assert wrong.exit_code == 2
    assert "expected ADAPTER=WEIGHT" in wrong.output
    assert combine([one, two], [0.5, -1], both).manifest.settings["adapters"] == [one, two]
