"""The face: every documented name, sorted, and loaded only when it is used."""

import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import raytune_ft

DOCUMENTED = {
    *("DataCollectionConfig", "DataCollector", "DatasetFormat"),
    *("FineTuningConfig", "FineTuningMethod", "FineTuner"),
    *("EvaluationConfig", "EvaluationMetric", "ModelEvaluator", "compare_models", "generate_evaluation_report"),
    *("QuantizationConfig", "QuantizationMethod", "quantize_model"),
    *("PruningConfig", "PruningMethod", "prune_model"),
    *("SweepConfig", "HyperparameterSweep", "ServingConfig", "ModelServer", "PipelineConfig", "Pipeline"),
    *("DistillationConfig", "distill_model", "recommend_method"),
}


def loaded_after(program):
    watched = ("torch", "ray", "pydantic", "transformers", "pyarrow", "yaml", "rich", "typer")
    watching = f"import json, sys\nprint(json.dumps([name for name in {watched} if name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{watching}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_importing_the_package_loads_nothing():
    assert loaded_after("import raytune_ft") == []
    assert loaded_after("import raytune_ft; dir(raytune_ft); raytune_ft.UserError") == []


def test_settings_load_neither_torch_nor_ray():
    names = [name for name in raytune_ft.__all__ if name.endswith(("Config", "Method", "Metric", "Format"))]
    loaded = loaded_after(f"import raytune_ft\nfor name in {names}: getattr(raytune_ft, name)")
    assert not {"torch", "ray", "transformers"} & set(loaded)


def test_every_documented_name_is_there():
    assert set(raytune_ft.__all__) >= DOCUMENTED
    assert raytune_ft.__all__ == sorted(raytune_ft.__all__)


@pytest.mark.parametrize("name", raytune_ft.__all__)
def test_a_name_leads_to_its_object(name):
    assert getattr(raytune_ft, name) is not None
    assert name in dir(raytune_ft)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'raytune_ft' has no attribute 'Finetuner'"):
        raytune_ft.Finetuner  # noqa: B018  the access is the test


def test_the_version_is_the_distributions():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project.get("version", raytune_ft.__version__) == raytune_ft.__version__
    installed = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    assert installed.get("raytune-ft", raytune_ft.__version__) == raytune_ft.__version__
