"""The commands that take options in the place of a file of settings; `cli` has their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from raytune_ft.console import list_runs, make_table, print_artifact, print_out, show_run, standard_output
from raytune_ft.core.errors import ConfigError
from raytune_ft.core.grammar import number_of
from raytune_ft.exits import guarded


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
        if summary and (model or max_pairs is not None or port):
            raise ConfigError("--model, --max-pairs and --port: --summary serves no page; leave them out")
        if summary:
            found = judging.conclude(report, output_dir)
        else:
            found = judging.judge(report, output_dir=output_dir, models=model, max_pairs=max_pairs, port=port)
        print_out(*((rate.words for rate in found.win_rates) if found else ["no votes"]))

    raise typer.Exit(guarded(judge_report))


def key() -> None:
    """Make an API key for an endpoint, and the sha256 of it that goes into the settings; neither is kept."""
    from raytune_ft.serving.keys import hashed, new_key

    made = new_key()
    print_out(f"key (for the client):         {made}\nsha256 (for api_keys):        {hashed(made)}")


def doctor(
    storage: Annotated[str | None, typer.Option(help="Folder or URI to write, read and delete a probe in.")] = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="Say instead which training settings go together.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --matrix: as a Markdown table.")] = False,
) -> None:
    """Say what this machine has, what it lacks, and how to get it; exit code 1 if something needed is missing."""
    if matrix or markdown:
        raise typer.Exit(guarded(lambda: _print_matrix(storage, markdown=markdown), resumes=False))
    from raytune_ft.core.doctor import Finding, Verdict, examine

    findings: list[Finding] = []
    code = guarded(lambda: findings.extend(examine(storage)), resumes=False)
    table = make_table()
    for finding in findings:
        words = finding.found + (f"\n-> {finding.remedy}" if finding.remedy else "")
        table.add_row(finding.verdict, finding.what, words)
    print_out(table)
    raise typer.Exit(code or int(any(finding.verdict == Verdict.MISSING for finding in findings)))


def _print_matrix(storage: str | None, *, markdown: bool) -> None:
    from dataclasses import astuple

    from raytune_ft.training import matrix

    if storage is not None:
        raise ConfigError("--storage: the matrix writes no probe; leave it out, or --matrix and --markdown")
    if markdown:
        with standard_output() as out:
            out.write(matrix.markdown())
        return
    table = make_table(*matrix.HEADINGS)
    for line in matrix.lines():
        table.add_row(*astuple(line))
    print_out(table)


def merge(
    model: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter: folder, URI or artifact.")],
    output_dir: Annotated[str, typer.Argument(metavar="OUTPUT_DIR", help="Folder or URI for the whole model.")],
) -> None:
    """Merge an adapter into its base, in full precision, and check that it answers as before."""
    from raytune_ft.models.derived import merge as merged

    raise typer.Exit(guarded(lambda: print_artifact(merged(model, output_dir)), resumes=False))


def combine(
    output_dir: Annotated[str, typer.Argument(metavar="OUTPUT_DIR", help="Folder or URI for the adapter.")],
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER=WEIGHT...", help="LoRA adapters of one base.")],
    combination_type: Annotated[
        str, typer.Option(help="cat: the exact sum, of larger rank; svd: of chosen rank; linear: rough, equal ranks.")
    ] = "cat",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the svd result.")] = None,
) -> None:
    """Combine several LoRA adapters into one, their weighted sum."""
    raise typer.Exit(guarded(lambda: _combine(output_dir, adapters, combination_type, rank), resumes=False))


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


def inspect(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="A prepared dataset: folder or URI.")],
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 5,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    html: Annotated[str | None, typer.Option(help="Write a page there instead of printing.")] = None,
    model: Annotated[str | None, typer.Option(help="Whose tokenizer shows them; by default the dataset's.")] = None,
) -> None:
    """Show rows as training sees them: their tokens, the supervised ones in colour."""
    raise typer.Exit(guarded(lambda: _inspect(dataset, rows, split, html, model), resumes=False))


def _inspect(dataset: str, rows: int, split: str, html: str | None, model: str | None) -> None:
    from raytune_ft.data.inspection import inspect_rows, print_rows, to_html

    found = inspect_rows(dataset, rows=rows, split=split, model=model)
    if html is None:
        from rich.console import Console

        with standard_output() as out:
            print_rows(found, Console(file=out, highlight=False))
        return
    from raytune_ft.core.refusals import told_in_words
    from raytune_ft.core.storage import Location

    target = Location.at(html)
    with told_in_words(target):
        target.write(to_html(found, title=f"{dataset}: {split}").encode())
    print_out(f"{number_of(len(found), 'row')} of {split}: {target}")


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
    raise typer.Exit(guarded(lambda: _recommend(model, memory_gb, rows, goal, max_length), resumes=False))


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


def runs(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[STORAGE_PATH] | show NAME_OR_PATH", help="By default: runs")
    ] = None,
    storage: Annotated[str | None, typer.Option(help="Where `show NAME` looks for the name; by default: runs")] = None,
) -> None:
    """List the runs under a storage path (a folder or URI), or tell one run's story."""
    match words or [storage or "runs"]:
        case ["show", name]:
            code = guarded(lambda: show_run(name, storage or "runs"), resumes=False)
        case [where] if words and storage is not None:
            raise typer.BadParameter(f"--storage is where `show NAME` looks; {where} is listed without it")
        case [where]:
            code = guarded(lambda: list_runs(where), resumes=False)
        case _:
            raise typer.BadParameter("expected [STORAGE_PATH], or show NAME_OR_PATH")
    raise typer.Exit(code)
