"""The command line: it reads arguments, calls the library and shows what happens; torch is loaded when work starts."""

from __future__ import annotations

import sys
import warnings
from enum import StrEnum
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from robustlens.core.signals import Terminated, heeded
from robustlens.results.errors import InputError, RobustlensError
from robustlens.say import say_error, say_warning

if TYPE_CHECKING:
    from robustlens.results.store import RunDirectory
    from robustlens.studies.config import StudyConfig


class Format(StrEnum):
    """How a figure is written."""

    pdf = "pdf"
    svg = "svg"
    png = "png"


class Depth(StrEnum):
    """How much is looked at."""

    quick = "quick"
    full = "full"


class Executor(StrEnum):
    """Where runs are carried out."""

    here = "here"
    ray = "ray"


app = typer.Typer(
    help="Train robust classifiers, look inside them, and test what the papers say about them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(emoji=False)

SOURCES = "mnist5k, digits, a Hub id, a directory, or a name under ROBUSTLENS_DATA."
USUAL = "the preset's, or lenet-small on mnist5k at l2:1.5 for 10 epochs"


def _local(out: Path) -> Path:
    if ":/" in str(out):
        raise InputError(
            "--out", expected="a directory", got=str(out), fix="Addresses are for `study`, `train` and `demo`."
        )
    return out


Out = Annotated[Path, typer.Option(help="Directory for runs and pages.", callback=_local)]
Runs = Annotated[str, typer.Option(help="Directory for runs and pages, or an address: s3://bucket/runs.")]
Places = Annotated[list[str], typer.Argument(help="Run directories, or directories or addresses that hold some.")]
Track = Annotated[list[str] | None, typer.Option(help='"tensorboard", or pkg.module:callable of your own. Repeatable.')]
Device = Annotated[str, typer.Option(help='"auto", "cpu" or "cuda".')]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: training.epochs=3. Repeatable.")]
Threat = Annotated[str, typer.Option(help='What the adversary may do: "l2:1.5", "linf:8/255", "l1:12".')]


@app.command()
def demo(out: Runs = "runs", device: Device = "auto", overrides: Set = None) -> None:
    """Train five networks on real digits, look inside them, and write a page."""
    from importlib.resources import as_file, files

    from robustlens.studies.config import read_study

    with as_file(files("robustlens.studies") / "demo.toml") as path:
        _study(read_study(path, overrides or ()), out, device)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="A study as TOML.")],
    out: Runs = "runs",
    device: Device = "auto",
    overrides: Set = None,
    track: Track = None,
    executor: Annotated[Executor, typer.Option(help="Run after run here, or side by side on a Ray cluster.")] = (
        Executor.here
    ),
    address: Annotated[
        str | None,
        typer.Option(help="Of the Ray cluster.", envvar="RAY_ADDRESS", show_default="one of this machine is started"),
    ] = None,
    cpus_per_run: Annotated[float, typer.Option(min=0, help="Cores that Ray sets aside for each run.")] = 1,
    gpus_per_run: Annotated[float, typer.Option(min=0, help="GPUs that Ray sets aside for each run.")] = 0,
) -> None:
    """Carry out a study: train, look, and write a page. Run it again to go on after an interruption."""
    from robustlens.studies.config import read_study

    config = read_study(file, overrides or ())
    if executor is Executor.here:
        _study(config, out, device, track)
        return
    from robustlens.board import show_on_ray

    where = {"address": address, "cpus_per_run": cpus_per_run, "gpus_per_run": gpus_per_run}
    runs = show_on_ray(console, config, out, device=device, track=track or (), **where)
    _page(config, runs, out)


@app.command()
def train(
    method: Annotated[
        str,
        typer.Option(help='"standard", "noise", an attack to train against, or a preset of `robustlens list methods`.'),
    ] = "pgd",
    data: Annotated[
        str | None,
        typer.Option(
            help="mnist5k, digits, a Hub id, a directory, or a name under ROBUSTLENS_DATA.", show_default=USUAL
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="See `robustlens list model`.", show_default=USUAL)] = None,
    threat: Annotated[
        str | None,
        typer.Option(help='What the adversary may do: "l2:1.5", "linf:8/255", "l1:12".', show_default=USUAL),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.", show_default=USUAL)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Everything random follows from it.")] = 0,
    out: Runs = "runs",
    device: Device = "auto",
    overrides: Set = None,
    track: Track = None,
) -> None:
    """Train one network, look inside it, and write a page."""
    from robustlens.studies.config import single_run

    _study(
        single_run(
            data=data, model=model, method=method, threat=threat, epochs=epochs, seed=seed, overrides=overrides or ()
        ),
        out,
        device,
        track,
    )


@app.command()
def audit(
    model: Annotated[
        str,
        typer.Argument(
            help="pkg.module:callable that returns the network, a TorchScript or ExportedProgram file, timm:NAME, "
            "robustbench:ID, or a name from `list`."
        ),
    ],
    data: Annotated[str, typer.Option(help=SOURCES)],
    threat: Threat,
    weights: Annotated[Path | None, typer.Option(help="safetensors, or a state dict without code in it.")] = None,
    mean: Annotated[str | None, typer.Option(help="Channel means to put inside the model: 0.49,0.48,0.45")] = None,
    std: Annotated[str | None, typer.Option(help="Channel deviations to put inside the model.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="At most that many images of each split.")] = 1000,
    depth: Annotated[
        Depth, typer.Option(help="quick: minutes on a laptop; full: more of everything, its time is said first.")
    ] = Depth.quick,
    standard: Annotated[
        bool, typer.Option("--standard", help="Also run AutoAttack-standard; interrupt it, and it goes on from there.")
    ] = False,
    require: Annotated[
        list[str] | None,
        typer.Option(help='What it must show, else the exit code is 1: "robust>=0.45", "clean>=0.9". Repeatable.'),
    ] = None,
    out: Out = Path("runs/audit"),
    device: Device = "auto",
) -> None:
    """Look inside a network of your own, on data of your own."""
    from robustlens.core.world import joined, together
    from robustlens.report.page import write_page
    from robustlens.show import Show, expectation, table
    from robustlens.studies.audit import audit as run_audit
    from robustlens.studies.audit import estimate, open_model, open_splits
    from robustlens.studies.require import Requirement, check_requirements

    requirements = [Requirement.parse(text) for text in require or ()]
    splits = open_splits(data, examples=examples)
    network = open_model(model, splits, threat=threat, weights=weights, mean=mean, std=std)
    with together(device) as place:
        look = partial(
            run_audit, network, splits, threat=threat, label=model, depth=depth.value, standard=standard, out=out
        )
        if not joined().leads:
            look(device=place)
            return
        if depth is Depth.full or standard:
            seconds = estimate(network, splits, threat=threat, depth=depth.value, standard=standard, device=place)
            expectation(console, seconds)
        with Show(console) as show:
            run = look(device=place, watch=show)
    table(console, [run])
    _say_page(write_page([run], run.path / "report.html", title=f"Audit of {model}"))
    check_requirements(requirements, run.readings())


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A run directory, or a directory or an address that holds one.")],
    second: Annotated[str, typer.Argument(help="Another one, looked at with the same data, threat and examples.")],
) -> None:
    """Compare two networks example by example: the difference of their accuracies, with an interval."""
    from robustlens.results.mirror import fetched
    from robustlens.show import comparison
    from robustlens.studies.compare import compare as compared

    comparison(console, compared(*fetched([first, second])))


@app.command()
def reproduce(
    name: Annotated[str | None, typer.Argument(help="A recipe, such as 004-table1; nothing lists them.")] = None,
    scale: Annotated[
        str, typer.Option(help="paper; laptop: less data or fewer epochs; smoke: it runs, and nothing more.")
    ] = "laptop",
    seeds: Annotated[str | None, typer.Option(help="0,1,2", show_default="the recipe's")] = None,
    weights: Annotated[Path | None, typer.Option(help="Directory of published networks, where a recipe asks.")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Also keep the record and the runs' numbers here, without weights.")
    ] = None,
    out: Out = Path("runs"),
    device: Device = "auto",
    overrides: Set = None,
) -> None:
    """Carry out a paper's table or figure, and show its numbers beside yours."""
    from robustlens.recipes.recipe import find_recipe, find_scale, recipes
    from robustlens.recipes.reproduce import parse_seeds, write
    from robustlens.recipes.reproduce import reproduce as carry_out
    from robustlens.show import Show, front, recipe_list

    if name is None:
        recipe_list(console, recipes().values())
        return
    recipe, size, chosen = find_recipe(name), find_scale(scale), parse_seeds(seeds)
    console.print(f"{escape(recipe.what)}\n{size} scale: {escape(recipe.expects.get(size, 'minutes'))}", soft_wrap=True)
    with Show(console) as show:
        found = carry_out(
            recipe, size, out, seeds=chosen, overrides=overrides or (), weights=weights, device=device, watch=show
        )
    for table in found.front:
        front(console, table)
    _say_page(write(found, out, keep))


@app.command()
def claims(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Run directories, or directories or addresses that hold some.")
    ] = None,
    study: Annotated[
        Path | None, typer.Option(help="A study file: carry it out first, then judge by its runs.")
    ] = None,
    also: Annotated[list[str] | None, typer.Option(help="pkg.module:CLAIM, a claim of your own. Repeatable.")] = None,
    page: Annotated[Path | None, typer.Option(help="Also write the page of the runs, with the ledger on it.")] = None,
    out: Out = Path("runs"),
    device: Device = "auto",
) -> None:
    """Judge the papers' claims by runs: the ledger."""
    from robustlens.claims.ledger import claims as known
    from robustlens.claims.ledger import find_claim
    from robustlens.claims.ledger import ledger as judge
    from robustlens.report.front import ledger
    from robustlens.results.mirror import fetched
    from robustlens.results.runs import read_runs
    from robustlens.results.store import find_runs
    from robustlens.show import Show
    from robustlens.show import claims as show_claims

    judged = [*(find_claim(path) for path in also or ()), *known()]
    directories = find_runs(fetched(runs)) if runs else []
    if study is not None:
        from robustlens.studies.config import read_study
        from robustlens.studies.run import run_study

        with Show(console) as show:
            directories += run_study(read_study(study), out, device=device, watch=show)
    entries = judge(read_runs(directories), judged)
    show_claims(console, entries)
    if page is not None:
        from robustlens.report.page import write_page

        _say_page(write_page(directories, page, title="Claims", front=[ledger(entries)]))


@app.command()
def report(
    runs: Places,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Its title.")] = "robustlens report",
    figures: Annotated[Path | None, typer.Option(help="Also write every chart as a file into this directory.")] = None,
    format: Annotated[Format, typer.Option(help="Of the figures.")] = Format.pdf,
) -> None:
    """Write the page, and the figures for a paper, from finished runs."""
    from robustlens.report.figures import write_figures
    from robustlens.report.page import write_page
    from robustlens.results.mirror import fetched
    from robustlens.results.store import find_runs

    found = find_runs(fetched(runs))
    _say_page(write_page(found, out, title=title))
    if figures is not None:
        files = write_figures(found, figures, format=format.value)
        console.print(f"{len(files)} figures in {escape(str(figures))}")


@app.command(name="list")
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(help="attack, objective, lens, model, method, data, recipe, claim, …; nothing for all."),
    ] = None,
) -> None:
    """Show what there is, from attacks to recipes and claims, with settings and sources."""
    from robustlens.show import catalogue

    catalogue(console, kind)


def _study(config: StudyConfig, out: str, device: str, track: list[str] | None = None) -> None:
    from robustlens.core.world import joined, together
    from robustlens.show import Show
    from robustlens.studies.run import run_study

    with together(device) as place:
        if not joined().leads:
            run_study(config, out, device=place)
            return
        with Show(console) as show:
            runs = run_study(config, out, device=place, watch=show, track=track or ())
    _page(config, runs, out)


def _page(config: StudyConfig, runs: list[RunDirectory], out: str) -> None:
    """The table and the page of a finished study."""
    from robustlens.report.page import write_page
    from robustlens.results.mirror import is_remote, publish
    from robustlens.show import table

    table(console, runs)
    home = runs[0].path.parent
    page = write_page(runs, home / "report.html", title=config.name)
    _say_page(publish(page, home.parent, out) if is_remote(out) else page)


def _say_page(path: Path | str) -> None:
    console.print(f"\nThe page: [bold]{escape(str(path))}[/bold]", soft_wrap=True)


def main() -> None:
    """Entry point: errors that a user can act on become one line and an exit code."""
    sys.path.insert(0, "")  # as `python -m` does: mypkg.net:build is looked for in the working directory first
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ε or ⚠ shows a question mark
    try:
        with heeded(), warnings.catch_warnings():
            warnings.showwarning = say_warning
            code = app(standalone_mode=False) or 0
    except Terminated as error:
        code = error.code
    except RobustlensError as error:
        code = error.exit_code
        say_error(str(error))
    except typer.Abort:
        code = 130
    except Exception as error:  # typer's own errors: an unknown option, a missing argument, a value that does not fit
        if not hasattr(error, "format_message"):
            raise
        code = getattr(error, "exit_code", 2)
        if text := error.format_message():
            say_error(f"{' '.join(text.split()).rstrip('.')}. See --help.")
    if code in (130, 143):
        Console(stderr=True).print("Stopped. Run the same command again to go on from here.")
    sys.exit(code)


if __name__ == "__main__":
    main()
