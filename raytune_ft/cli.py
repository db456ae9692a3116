"""The door: ``raytune-ft VERB CONFIG.yaml [dotted.key=value ...]``, and the only table of verbs.

Exit codes: 0 done, 1 failed, 2 the user's mistake (a message, no traceback), 130 interrupted. Everything heavy is
imported after the arguments are known, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raytune_ft import __version__, commands
from raytune_ft.console import print_artifact, print_out, standard_output
from raytune_ft.core.errors import ConfigError, OutputError
from raytune_ft.exits import fail, guarded

if TYPE_CHECKING:
    from raytune_ft.core.artifacts import Artifact
    from raytune_ft.core.config import Config


@dataclass(frozen=True)
class Verb:
    """What a verb of the command line reads and calls, as ``module:name`` below ``raytune_ft``."""

    config: str
    function: str
    help: str
    resumes: bool = True
    """Whether a repeated command goes on from where it was interrupted."""

    def load_config_class(self) -> type[Config]:
        """The class of the verb's settings."""
        return _load(self.config)  # type: ignore[no-any-return]

    def load_function(self) -> Callable[[Config], Artifact | None]:
        """The function that does the work."""
        return _load(self.function)  # type: ignore[no-any-return]


VERBS: Mapping[str, Verb] = {
    "prepare": Verb("data.config:DataCollectionConfig", "data.run:prepare", "Make a dataset from records.", False),
    "train": Verb("training.config:FineTuningConfig", "training.run:train", "Fine-tune a model on a dataset."),
    "tune": Verb("tuning.config:SweepConfig", "tuning.run:tune", "Search for the settings that train best."),
    "evaluate": Verb("evaluation.config:EvaluationConfig", "evaluation.run:evaluate", "Measure a model on a test set."),
    "compare": Verb("evaluation.config:ComparisonConfig", "evaluation.run:compare", "Measure models on the same rows."),
    "generate": Verb(
        "evaluation.config_inference:BatchGenerationConfig", "evaluation.generate:generate", "Answer files of prompts."
    ),
    "quantize": Verb(
        "compression.config:QuantizationJob", "compression.run:quantize", "Store a model in fewer bits.", False
    ),
    "prune": Verb("compression.config:PruningJob", "compression.run:prune", "Remove weights that matter least.", False),
    "distill": Verb("training.config:DistillationConfig", "training.run:distill", "Teach a smaller model."),
    "align": Verb(
        "training.config_alignment:PreferenceConfig", "training.run:train", "Train on which answers people prefer."
    ),
    "reward": Verb("training.config_alignment:RewardConfig", "training.run:train", "Train a model of preferences."),
    "reinforce": Verb(
        "training.config_alignment:ReinforcementConfig", "training.run:train", "Learn from rewards for own answers."
    ),
    "ladder": Verb("evaluation.config_ladder:LadderConfig", "evaluation.ladder:ladder", "What smaller versions cost."),
    "serve": Verb(
        "serving.config:ServingConfig", "serving.run:serve", "Host a model behind an OpenAI-compatible API.", False
    ),
    "ab": Verb(
        "evaluation.config_ab:ABAnalysisConfig", "evaluation.ab:analyse_ab_test", "What an A/B test says so far.", False
    ),
    "pipeline": Verb("pipeline.config:PipelineConfig", "pipeline.run:run_pipeline", "Run these, from one file."),
}

_HELP = (
    "Prepare, search, train, evaluate, shrink and serve language models on a Ray cluster.\n\n"
    "Exit codes: 0 done, 1 failed, 2 the user's mistake, 130 interrupted, 143 stopped by SIGTERM; the last line "
    "says whether the same command goes on from there."
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _say_version(asked: bool) -> None:
    if asked:
        print_out(f"raytune-ft {__version__}")
        raise typer.Exit


@app.callback(help=_HELP)
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Print the version.")
    ] = False,
) -> None:
    pass


def _load(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(import_module(f"raytune_ft.{module}"), name)


def main() -> None:
    """The command ``raytune-ft``."""
    try:
        _run_app()
    except OutputError as error:
        sys.exit(fail(error))


def _run_app() -> None:
    try:
        app(prog_name="raytune-ft")
    except OSError:
        with standard_output() as out:  # says so where it was this that takes no more, as of a page of help
            out.write("\n")
        raise


def run_verb(verb: str, arguments: Sequence[str]) -> int:
    """Runs a verb on ``CONFIG [dotted.key=value ...]`` and gives the exit code; scripts in `jobs/` call this, too.

    Raises:
        Exception: what nobody foresaw, so that its traceback is shown.
    """
    if not arguments:
        return fail(ConfigError(f"expected {verb} CONFIG.yaml [dotted.key=value ...]"))
    path, *overrides = arguments
    return guarded(lambda: _run(verb, path, overrides), resumes=VERBS[verb].resumes)


def _run(verb: str, path: str, overrides: Sequence[str]) -> None:
    from raytune_ft.core.config import load_config

    entry = VERBS[verb]
    config = load_config(entry.load_config_class(), path, overrides)
    _refuse_lost_work(config)
    artifact = entry.load_function()(config)
    if artifact is not None:
        print_artifact(artifact)


def _refuse_lost_work(config: Config) -> None:
    """A job's working folder is a copy that Ray deletes: results have to lie elsewhere."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return
    here = Path.cwd()
    for key in ("output_dir", "output_path", "storage_path"):
        where = getattr(config, key, None)
        if (
            isinstance(where, str | Path)
            and "://" not in str(where)
            and (here / Path(where).expanduser()).is_relative_to(here)
        ):
            raise ConfigError(
                f"{key}: {where} lies in the job's working folder, which Ray deletes. Name a folder on storage that "
                f"all nodes share, for example {key}=/mnt/shared/{where} or {key}=s3://BUCKET/{where}"
            )


def _add_verb(name: str, verb: Verb) -> None:
    @app.command(name, help=verb.help, epilog=f"All settings: raytune-ft schema {name}")
    def command(
        config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="The settings.")],
        overrides: Annotated[
            list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, dotted.key=value.")
        ] = None,
    ) -> None:
        raise typer.Exit(run_verb(name, [config, *(overrides or ())]))


for _name, _verb in VERBS.items():
    if _name != "compare":  # takes reports, too
        _add_verb(_name, _verb)


@app.command()
def quickstart(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, dotted.key=value.")
    ] = None,
    output_dir: Annotated[str, typer.Option(help="Folder or URI that everything is written to.")] = "runs/quickstart",
) -> None:
    """The whole circle on shipped data and a small model: minutes, on a CPU."""
    from importlib.resources import as_file, files

    with as_file(files("raytune_ft.quickstart") / "quickstart.yaml") as path:
        code = run_verb("pipeline", [str(path), f"storage_path={json.dumps(output_dir)}", *(overrides or ())])
    raise typer.Exit(code)


@app.command()
def schema(verb: Annotated[str, typer.Argument(help=f"One of {', '.join(VERBS)}.")]) -> None:
    """Print the JSON schema of a verb's settings, for editors."""
    if verb not in VERBS:
        raise typer.BadParameter(f"{verb!r} is not one of {', '.join(VERBS)}")
    with standard_output() as out:
        print(json.dumps(VERBS[verb].load_config_class().model_json_schema(), indent=2, ensure_ascii=False), file=out)


@app.command(epilog="All settings: raytune-ft schema compare")
def compare(
    words: Annotated[list[str], typer.Argument(metavar="CONFIG.yaml [KEY=VALUE]... | REPORT REPORT...")],
    *,
    output_dir: Annotated[str | None, typer.Option(help="Of reports: where the joined report goes.")] = None,
    gate: Annotated[bool, typer.Option("--gate", help="Exit code 1 unless the first report beats all others.")] = False,
    metric: Annotated[str | None, typer.Option(help="Of the gate; by default the strictest measured.")] = None,
    max_drop: Annotated[float, typer.Option(help="Of the gate: how much worse will do, in units of the metric.")] = 0.0,
    confidence: Annotated[float, typer.Option(help="Of the gate: with which it has to be shown.")] = 0.95,
) -> None:
    """Compare models on the same rows: those that a file names, or those of reports that were made before."""
    if words[0].endswith((".yaml", ".yml")) and not gate:
        given = {"output_dir": output_dir, "metric": metric, "max_drop": max_drop, "confidence": confidence}
        raise typer.Exit(guarded(lambda: _refuse_report_options(given)) or run_verb("compare", words))
    passed: list[bool] = []
    terms = {"metric": metric, "max_drop": max_drop, "confidence": confidence}
    code = guarded(lambda: passed.extend(_compare(words, output_dir, gate, terms)))
    raise typer.Exit(code or int(not all(passed)))


def _refuse_report_options(given: dict[str, Any]) -> None:
    usual = {"output_dir": None, "metric": None, "max_drop": 0.0, "confidence": 0.95}
    named = ", ".join(f"--{name.replace('_', '-')}" for name, value in given.items() if value != usual[name])
    if named:
        raise ConfigError(
            f"{named}: for reports, not for a config file; give its settings as KEY=VALUE, "
            "as in output_dir=runs/compared"
        )


def _compare(reports: list[str], output_dir: str | None, gate: bool, terms: dict[str, Any]) -> list[bool]:
    from raytune_ft.evaluation.joining import joined, open_reports, write_joined

    if not gate and terms != {"metric": None, "max_drop": 0.0, "confidence": 0.95}:
        raise ConfigError("--metric, --max-drop and --confidence belong to --gate")
    artifacts, results = open_reports(reports)
    if output_dir is not None:
        print_artifact(write_joined(artifacts, output_dir))
    if not gate:
        print_out(str(joined(results)))
        return []
    decisions = [results[0].beats(other, **terms) for other in results[1:]]
    print_out(*(decision.words for decision in decisions))
    return [decision.passed for decision in decisions]


for _command in (commands.judge, commands.key, commands.doctor, commands.merge, commands.inspect, commands.recommend):
    app.command()(_command)
app.command(epilog="raytune-ft combine runs/both runs/a=0.7 runs/b=0.3")(commands.combine)
app.command(epilog="raytune-ft runs [STORAGE_PATH]  or  raytune-ft runs show NAME_OR_PATH")(commands.runs)
