"""Settings: what a bad file says, what an override changes, and what counts as the same run."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field, SecretStr, ValidationError, model_validator

from raytune_ft.compression.config import PruningJob
from raytune_ft.core.config import Config, apply_overrides, load_config, masked, read_settings
from raytune_ft.core.errors import ConfigError, UserError
from raytune_ft.evaluation.config import EvaluationConfig
from raytune_ft.serving.config import ServingConfig
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.tuning.config import SweepConfig


class Method(StrEnum):
    LORA = "lora"
    FULL = "full"


class Optimizer(Config):
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Step size."""
    token: SecretStr = SecretStr("")
    """A secret."""


class Settings(Config):
    model_path: str
    """Where the model is."""
    lora_r: Annotated[int, Field(ge=1)] = 8
    """Rank."""
    method: Method = Method.LORA
    """How."""
    modules: tuple[str, ...] = ()
    """Which."""
    optimizer: Optimizer = Optimizer()
    """Nested."""
    output_dir: str = "runs/a"
    """Where to."""

    @model_validator(mode="after")
    def _full_has_no_rank(self) -> "Settings":
        if self.method == Method.FULL and self.lora_r != 8:
            raise ValueError("lora_r means nothing for the full method")
        return self


def written(folder: Path, text: str) -> Path:
    path = folder / "train.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def fault(folder: Path, text: str, *overrides: str) -> str:
    path = written(folder, text)
    with pytest.raises(ConfigError) as caught:
        load_config(Settings, path, overrides)
    return str(caught.value).replace(f"{folder}/", "")


def test_a_file_and_its_overrides_become_settings(tmp_path):
    path = written(tmp_path, "model_path: here\nlora_r: 4\noptimizer: {learning_rate: 1e-4}\n")
    settings = load_config(Settings, path, ["lora_r=16", "optimizer.learning_rate=5e-3", "modules=[q_proj, v_proj]"])
    assert settings.lora_r == 16
    assert settings.optimizer.learning_rate == 0.005
    assert settings.modules == ("q_proj", "v_proj")


def test_a_number_out_of_range_names_file_key_bound_and_value(tmp_path):
    assert fault(tmp_path, "model_path: x\nlora_r: 0\n") == "train.yaml: lora_r: must be at least 1 (got 0)"


def test_a_misspelt_key_says_which_key_was_meant(tmp_path):
    assert fault(tmp_path, "model_path: x\nlora_rank: 4\n") == (
        "train.yaml: lora_rank: there is no such setting; did you mean lora_r?"
    )
    nested = fault(tmp_path, "model_path: x\noptimizer: {learning_rat: 1}\n")
    assert nested == "train.yaml: optimizer.learning_rat: there is no such setting; did you mean learning_rate?"


@pytest.mark.parametrize(
    ("config", "key", "meant"),
    [
        (ServingConfig, "modle_path", "model_path"),
        (ServingConfig, "max_token", "max_new_tokens"),
        (ServingConfig, "timeout", "drain_timeout_s"),
        (ServingConfig, "ab", "ab_test"),
        (FineTuningConfig, "epochs", "num_train_epochs"),
        (FineTuningConfig, "alpha", "lora_alpha"),
        (FineTuningConfig, "batch_size", "per_device_eval_batch_size or per_device_train_batch_size"),
        (FineTuningConfig, "model_name", "model_path"),
        (SweepConfig, "trials", "num_trials"),
    ],
)
def test_a_setting_is_meant_by_a_part_of_it_or_a_like_spelling(config, key, meant):
    with pytest.raises(ConfigError, match=f"{key}: there is no such setting; did you mean {meant}\\?"):
        config(**{key: 1})


@pytest.mark.parametrize(
    ("config", "key"),
    [
        *((ServingConfig, key) for key in ("bits", "max_length", "device", "cors", "temperature")),
        *((FineTuningConfig, key) for key in ("lr", "optimizer", "fp16")),
        *((EvaluationConfig, key) for key in ("max_new_tokens", "generation")),
        *((PruningJob, key) for key in ("sparse", "ratio")),
    ],
)
def test_no_setting_is_meant_by_a_key_that_only_looks_a_little_like_it(config, key):
    with pytest.raises(ConfigError, match=rf"{key}: there is no such setting \(known: "):
        config(**{key: 1})


def test_a_key_like_no_other_lists_the_known_ones(tmp_path):
    text = fault(tmp_path, "model_path: x\nzzz: 1\n")
    assert text.startswith("train.yaml: zzz: there is no such setting (known: lora_r, method, model_path,")


def test_every_fault_has_its_own_line(tmp_path):
    lines = fault(tmp_path, "lora_r: many\nmethod: lorra\nmodules: 3\n").splitlines()
    assert lines == [
        "train.yaml: model_path: is required and was not given",
        "train.yaml: lora_r: must be a whole number (got 'many')",
        "train.yaml: method: must be one of 'lora' or 'full' (got 'lorra')",
        "train.yaml: modules: must be a list (got 3)",
    ]


def test_a_fault_between_keys_is_told_in_its_own_words(tmp_path):
    text = fault(tmp_path, "model_path: x\nlora_r: 4\nmethod: full\n")
    assert text == "train.yaml: lora_r means nothing for the full method"


def test_a_missing_file_a_torn_file_and_a_list_are_the_users_mistake(tmp_path):
    with pytest.raises(ConfigError, match="there is no such settings file"):
        read_settings(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"train.yaml:2: not valid YAML"):
        read_settings(written(tmp_path, "a: 1\nb: [1, 2}\n"))
    with pytest.raises(ConfigError, match=r"expected a mapping of settings \(key: value\), found a list"):
        read_settings(written(tmp_path, "- a\n- b\n"))
    with pytest.raises(ConfigError, match="cannot be read as a settings file"):
        read_settings(tmp_path)
    assert issubclass(ConfigError, UserError) and ConfigError.exit_code == 2


def test_an_empty_file_is_no_settings(tmp_path):
    assert read_settings(written(tmp_path, "# nothing yet\n")) == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora_r", "expected dotted.key=value"),
        ("=3", "expected dotted.key=value"),
        ("lora_r.deep=3", "lora_r is a number, it has no keys"),
        ("modules=[a", "is not a valid YAML value"),
    ],
)
def test_a_bad_override_is_quoted(override, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides({"lora_r": 8}, [override])


def test_overrides_leave_the_settings_they_came_from_alone():
    settings = {"optimizer": {"learning_rate": 0.1}}
    overrides = ["optimizer.learning_rate=1e-3", "optimizer.name=", "new.key=true", "new.word=yes"]
    changed = apply_overrides(settings, overrides)
    assert settings == {"optimizer": {"learning_rate": 0.1}}
    assert changed == {"optimizer": {"learning_rate": 0.001, "name": ""}, "new": {"key": True, "word": "yes"}}


def test_yaml_files_may_write_exponents_without_a_point(tmp_path):
    settings = load_config(Settings, written(tmp_path, "model_path: x\noptimizer: {learning_rate: 1e-3}\n"))
    assert settings.optimizer.learning_rate == 0.001


def test_what_is_quoted_and_what_looks_like_a_date_stays_text(tmp_path):
    text = "a: '1e3'\nb: 2024-02-30\nc: 2024-02-03\nd: 1.5e-3\ne: no\nf: 12e\ng: trueish\n"
    assert read_settings(written(tmp_path, text)) == {
        "a": "1e3", "b": "2024-02-30", "c": "2024-02-03", "d": 0.0015, "e": "no", "f": "12e", "g": "trueish",
    }  # fmt: skip


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path):
    with pytest.raises(ConfigError, match=r"train.yaml:3: not valid YAML: the key 'lora_r' stands twice"):
        read_settings(written(tmp_path, "lora_r: 8\nmodel_path: x\nlora_r: 16\n"))
    merged = "base: &b {lora_r: 8, method: lora}\nmine: {<<: *b, lora_r: 4}\n"
    assert read_settings(written(tmp_path, merged))["mine"] == {"lora_r": 4, "method": "lora"}
    nested = "a: &a {x: 1}\nouter: {b: &b {<<: *a, y: 2, x: 3}}\nc: {<<: *b, y: 4}\n"
    assert read_settings(written(tmp_path, nested))["c"]["y"] == 4
    with pytest.raises(ConfigError, match=r"train.yaml: not valid YAML: invalid literal for int"):
        read_settings(written(tmp_path, "lora_r: !!int many\n"))


def test_an_anchor_in_its_own_value_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"train.yaml: an anchor \(&\) stands in its own value"):
        read_settings(written(tmp_path, "a: &x {b: *x}\n"))


def test_a_text_given_as_an_override_is_no_comment():
    settings = {"prompt": "", "section": None}
    overrides = ["prompt=You are #1 of us", "section.key=1", "list=[1, 2] # two"]
    assert apply_overrides(settings, overrides) == {
        "prompt": "You are #1 of us", "section": {"key": 1}, "list": [1, 2],
    }  # fmt: skip


def test_settings_made_in_python_raise_the_same_error():
    with pytest.raises(ConfigError, match=r"Settings: lora_r: must be at least 1 \(got -1\)"):
        Settings(model_path="x", lora_r=-1)
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate: must be more than 0"):
        Settings(model_path="x", optimizer={"learning_rate": 0})


def test_settings_do_not_change_but_have_changed_copies():
    settings = Settings(model_path="x")
    with pytest.raises(ValidationError):
        settings.lora_r = 4
    assert settings.with_overrides(lora_r=4).lora_r == 4
    assert settings.lora_r == 8
    with pytest.raises(ConfigError):
        settings.with_overrides(lora_r=0)


def test_where_a_run_writes_is_no_part_of_its_identity():
    first, second = Settings(model_path="x", output_dir="runs/a"), Settings(model_path="x", output_dir="runs/b")
    assert first.identity() == second.identity()
    assert first.resolved()["output_dir"] == "runs/a"
    assert first.identity() != Settings(model_path="y").identity()


def test_resolved_settings_show_no_secret():
    settings = Settings(model_path="s3://key:secret@bucket/m", optimizer=Optimizer(token=SecretStr("hush")))
    text = str(settings.resolved())
    assert "secret" not in text and "hush" not in text
    assert settings.resolved()["model_path"] == "s3://***@bucket/m"


def test_masking_reaches_into_lists_and_mappings():
    assert masked({"a": ["https://u:p@host/x", 3], "b": SecretStr("s")}) == {"a": ["https://***@host/x", 3], "b": "***"}
    assert masked({"s3://u:p@bucket": 0.5}) == {"s3://***@bucket": 0.5}
    assert masked("s3://AKIAX:sec/re+t@bucket/x.jsonl") == "s3://***@bucket/x.jsonl"
    assert masked("https://bob:p@ss@127.0.0.1:9/x?auth=a#access_token=b") == "https://***@127.0.0.1:9/x?auth=***"
    assert masked("http://host:8000/models/a@main") == "http://host:8000/models/a@main"
    assert masked("gs://anonymous@bucket/a") == "gs://anonymous@bucket/a"
    assert masked("https://h/a.jsonl?v=1&X-Amz-Signature=abc&region=r") == (
        "https://h/a.jsonl?v=1&X-Amz-Signature=***&region=r"
    )
    assert masked("s3://b/d?access_key=a&secret_key=b") == "s3://b/d?access_key=***&secret_key=***"
    assert masked("What? is key=5") == "What? is key=5"


def test_the_schema_carries_the_docstrings_of_the_fields():
    assert Settings.model_json_schema()["properties"]["lora_r"]["description"] == "Rank."
