"""The door: ``raytune-ft VERB CONFIG.yaml [dotted.key=value ...]``, and the only table of verbs.

Exit codes: 0 done, 1 failed, 2 the user's mistake (a message, no traceback), 130 interrupted. Everything heavy is
imported after the arguments are known, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raytune_ft import __version__
from raytune_ft.console import (
    list_runs,
    make_table,
    print_artifact,
    print_out,
    set_up_logging,
    show_run,
    standard_output,
)
from raytune_ft.core.errors import ConfigError, OutputError, RaytuneError
from raytune_ft.core.grammar import number_of

if TYPE_CHECKING:
    from raytune_ft.core.artifacts import Artifact
    from raytune_ft.core.config import Config

logger = logging.getLogger("raytune_ft")


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
    "serve": Verb("serving.config:ServingConfig", "serving.run:serve", "Host a model behind an OpenAI-compatible API."),
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
        sys.exit(_fail(error))


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
        return _fail(ConfigError(f"expected {verb} CONFIG.yaml [dotted.key=value ...]"))
    path, *overrides = arguments
    return _guarded(lambda: _run(verb, path, overrides), resumes=VERBS[verb].resumes)


def _run(verb: str, path: str, overrides: Sequence[str]) -> None:
    from raytune_ft.core.config import load_config

    entry = VERBS[verb]
    config = load_config(entry.load_config_class(), path, overrides)
    _refuse_lost_work(config)
    artifact = entry.load_function()(config)
    if artifact is not None:
        print_artifact(artifact)


def _guarded(action: Callable[[], None], *, resumes: bool = True) -> int:
    set_up_logging()
    try:
        action()
    except RaytuneError as error:
        return _fail(error)
    except KeyboardInterrupt:
        terminated = False
        if "ray" in sys.modules:
            from raytune_ft.core.cluster import disconnect
            from raytune_ft.core.termination import was_terminated

            terminated = was_terminated()
            with suppress(KeyboardInterrupt):  # Ctrl-C again: Ray's processes end with this one
                disconnect()
        again = "goes on from here" if resumes else "begins anew"
        logger.warning("%s; the same command %s", "terminated" if terminated else "interrupted", again)
        return 143 if terminated else 130
    return 0


def _fail(error: RaytuneError) -> int:
    # What a Ray worker raised comes wrapped in its remote traceback, with the error itself as `cause`.
    cause = getattr(error, "cause", None)
    own = cause if isinstance(cause, RaytuneError) else error
    typer.echo(f"raytune-ft: {own}", err=True)
    return own.exit_code


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
        raise typer.Exit(_guarded(lambda: _refuse_report_options(given)) or run_verb("compare", words))
    passed: list[bool] = []
    terms = {"metric": metric, "max_drop": max_drop, "confidence": confidence}
    code = _guarded(lambda: passed.extend(_compare(words, output_dir, gate, terms)))
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


@app.command()
def judge(
    report: Annotated[str, typer.Argument(metavar="REPORT", help="A report with answers of at least two models.")],
    *,
    output_dir: Annotated[str | None, typer.Option(help="Where votes go; by default judging/ in the report.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Label of a model to judge (repeat); all by default.")] = None,
    max_pairs: Annotated[int | None, typer.Option(min=1, help="Only so many pairs of answers.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; any free one by default.")] = 0,
    summary: Annotated[bool, typer.Option("--summary", help="Only sum up the votes that there are.")] = False,
) -> None:
    """Let people judge answers side by side, blind, in a browser; their votes join the report as preferences."""
    from raytune_ft.evaluation import judge as judging

    def judge_report() -> None:
        if summary:
            found = judging.conclude(report, output_dir)
        else:
            found = judging.judge(report, output_dir=output_dir, models=model, max_pairs=max_pairs, port=port)
        print_out(*((rate.words for rate in found.win_rates) if found else ["no votes"]))

    raise typer.Exit(_guarded(judge_report))


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
def key() -> None:
    """Make an API key for an endpoint, and the sha256 of it that goes into the settings; neither is kept."""
    from raytune_ft.serving.keys import hashed, new_key

    made = new_key()
    print_out(f"key (for the client):         {made}\nsha256 (for api_keys):        {hashed(made)}")


@app.command()
def schema(verb: Annotated[str, typer.Argument(help=f"One of {', '.join(VERBS)}.")]) -> None:
    """Print the JSON schema of a verb's settings, for editors."""
    if verb not in VERBS:
        raise typer.BadParameter(f"{verb!r} is not one of {', '.join(VERBS)}")
    with standard_output() as out:
        print(json.dumps(VERBS[verb].load_config_class().model_json_schema(), indent=2, ensure_ascii=False), file=out)


@app.command()
def doctor(
    storage: Annotated[str | None, typer.Option(help="Folder or URI to write, read and delete a probe in.")] = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="Say instead which training settings go together.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --matrix: as a Markdown table.")] = False,
) -> None:
    """Say what this machine has, what it lacks, and how to get it; exit code 1 if something needed is missing."""
    if matrix or markdown:
        _print_matrix(markdown=markdown)
        return
    from raytune_ft.core.doctor import Finding, Verdict, examine

    findings: list[Finding] = []
    code = _guarded(lambda: findings.extend(examine(storage)), resumes=False)
    table = make_table()
    for finding in findings:
        words = finding.found + (f"\n-> {finding.remedy}" if finding.remedy else "")
        table.add_row(finding.verdict, finding.what, words)
    print_out(table)
    raise typer.Exit(code or int(any(finding.verdict == Verdict.MISSING for finding in findings)))


def _print_matrix(*, markdown: bool) -> None:
    from dataclasses import astuple

    from raytune_ft.training import matrix

    if markdown:
        with standard_output() as out:
            out.write(matrix.markdown())
        return
    table = make_table(*matrix.HEADINGS)
    for line in matrix.lines():
        table.add_row(*astuple(line))
    print_out(table)


@app.command()
def merge(
    model: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter: folder, URI or artifact.")],
    output_dir: Annotated[str, typer.Argument(metavar="OUTPUT_DIR", help="Folder or URI for the whole model.")],
) -> None:
    """Merge an adapter into its base, in full precision, and check that it answers as before."""
    from raytune_ft.models.derived import merge as merged

    raise typer.Exit(_guarded(lambda: print_artifact(merged(model, output_dir)), resumes=False))


@app.command(epilog="raytune-ft combine runs/both runs/a=0.7 runs/b=0.3")
def combine(
    output_dir: Annotated[str, typer.Argument(metavar="OUTPUT_DIR", help="Folder or URI for the adapter.")],
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER=WEIGHT...", help="LoRA adapters of one base.")],
    combination_type: Annotated[
        str, typer.Option(help="cat: the exact sum, of larger rank; svd: of chosen rank; linear: rough, equal ranks.")
    ] = "cat",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the svd result.")] = None,
) -> None:
    """Combine several LoRA adapters into one, their weighted sum."""
    raise typer.Exit(_guarded(lambda: _combine(output_dir, adapters, combination_type, rank), resumes=False))


def _combine(output_dir: str, adapters: Sequence[str], combination_type: Any, rank: int | None) -> None:
    paths, weights = [], []
    for adapter in adapters:
        path, _, weight = adapter.rpartition("=")
        try:
            weights.append(float(weight))
        except ValueError:
            path = ""
        if not path:
            raise ConfigError(f"expected ADAPTER=WEIGHT, for example runs/a=0.5 (got {adapter!r})")
        paths.append(path)
    from raytune_ft.models.derived import combine as combined

    print_artifact(combined(paths, weights, output_dir, combination_type, rank=rank))


@app.command()
def inspect(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="A prepared dataset: folder or URI.")],
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 5,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    html: Annotated[str | None, typer.Option(help="Write a page there instead of printing.")] = None,
    model: Annotated[str | None, typer.Option(help="Whose tokenizer shows them; by default the dataset's.")] = None,
) -> None:
    """Show rows as training sees them: their tokens, the supervised ones in colour."""
    raise typer.Exit(_guarded(lambda: _inspect(dataset, rows, split, html, model), resumes=False))


def _inspect(dataset: str, rows: int, split: str, html: str | None, model: str | None) -> None:
    from raytune_ft.data.inspection import inspect_rows, print_rows, to_html

    found = inspect_rows(dataset, rows=rows, split=split, model=model)
    if html is None:
        from rich.console import Console

        with standard_output() as out:
            print_rows(found, Console(file=out, highlight=False))
        return
    from raytune_ft.core.storage import Location, told_in_words

    target = Location.at(html)
    with told_in_words(target):
        target.write(to_html(found, title=f"{dataset}: {split}").encode())
    print_out(f"{number_of(len(found), 'row')} of {split}: {target}")


@app.command()
def recommend(
    model: Annotated[str, typer.Option(help="A model (folder, URI, hub id, starter:...), or its size, as 8B or 135M.")],
    memory_gb: Annotated[float, typer.Option(min=0.1, help="Memory of one device, in GiB.")],
    rows: Annotated[int | None, typer.Option(min=1, help="Training rows.")] = None,
    goal: Annotated[
        str,
        typer.Option(help="balanced, slight_domain_adaptation, multiple_related_tasks or complete_task_change."),
    ] = "balanced",
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 1024,
) -> None:
    """Say which method and starting values fit a model, the memory and the data, by the guide's tables, and why."""
    raise typer.Exit(_guarded(lambda: _recommend(model, memory_gb, rows, goal, max_length), resumes=False))


def _recommend(model: str, memory_gb: float, rows: int | None, goal: str, max_length: int) -> None:
    from typing import get_args

    from raytune_ft.training.recommend import Goal, recommend_method

    if goal not in get_args(Goal):
        raise ConfigError(f"--goal: must be one of {', '.join(get_args(Goal))} (got {goal!r})")
    found = recommend_method(model=model, memory_gib=memory_gb, rows=rows, goal=goal, max_length=max_length)  # type: ignore[arg-type]
    table = make_table()
    for key, value in found.settings.items():
        table.add_row(key, str(value))
    table.add_row("memory", f"{found.memory_gib:.1f} GiB predicted at the peak, of {memory_gb:g}")
    for part in ("weights", "gradients", "optimizer", "activations", "loss"):
        table.add_row(f"  {part}", f"{getattr(found.peak, part) / (1 << 30):.2f} GiB")
    for number, reason in enumerate(found.reasons):
        table.add_row("" if number else "because", reason)
    print_out(table)


@app.command(epilog="raytune-ft runs [STORAGE_PATH]  or  raytune-ft runs show NAME_OR_PATH")
def runs(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[STORAGE_PATH] | show NAME_OR_PATH", help="By default: runs")
    ] = None,
    storage: Annotated[str, typer.Option(help="Where `show NAME` looks for the name.")] = "runs",
) -> None:
    """List the runs under a storage path (a folder or URI), or tell one run's story."""
    match words or [storage]:
        case ["show", name]:
            code = _guarded(lambda: show_run(name, storage), resumes=False)
        case [where]:
            code = _guarded(lambda: list_runs(where), resumes=False)
        case _:
            raise typer.BadParameter("expected [STORAGE_PATH], or show NAME_OR_PATH")
    raise typer.Exit(code)
