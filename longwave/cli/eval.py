"""longwave eval: measure methods on tasks (run), list both (ls), fetch what tasks read (data), write a page of results
(report)."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from longwave.checks import check_options
from longwave.cli.common import ExtendRule, ExtendTo, Source
from longwave.cli.console import progress, show_json, show_table, user_errors
from longwave.cli.listing import first_line, methods, options_of
from longwave.evals.sampling import Sampling
from longwave.evals.spec import STOCK, parse_spec

app = typer.Typer(no_args_is_help=True, help="Measure methods on the field's benchmarks, and report.")

Repeats = list[str] | None


@app.command()
def run(
    method: Annotated[Repeats, typer.Option("--method", help='Method, "fourier:budget=0.25"; repeats.')] = None,
    plugin: Annotated[
        list[Path] | None, typer.Option(help="Python file that registers methods of yours, for --method; repeats.")
    ] = None,
    task: Annotated[Repeats, typer.Option("--task", help='Task, "needle:lengths=1000,2000"; repeats.')] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of results; a run in it goes on where it ended.")] = None,
    model: Annotated[str | None, typer.Option(help='Hub id, local path, or "smollm2" (the default).')] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with these options; flags win over it.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many samples of every set of a task.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of generated prompts; 42 unless said.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Cut prompts to this many tokens, by each task's own rule; else to the window.")
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(
            help='"after" (default): compress the context before the question is seen; "inside": compress the question '
            'with it; "with": read all of the prompt in one exact pass. A task may say it: needle:question=inside.'
        ),
    ] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Use the model's chat template.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of evaluation data; else $LONGWAVE_DATA.")] = None,
    device: Annotated[str | None, typer.Option(help='"auto" (default), "cpu", "cuda", "cuda:1", "mps".')] = None,
    dtype: Annotated[str | None, typer.Option(help='"auto" (default: 16 bits), "float32", ...')] = None,
    batch: Annotated[int | None, typer.Option(help="Prompts that share a pass, at most; 8 unless said.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Rows x longest prompt of a pass, at most; 16384 unless said.")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="Profile made by `longwave calibrate`.")] = None,
    extend_to: ExtendTo = None,
    extend_rule: ExtendRule = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens of a prompt and its answer at most, beyond what the model says it reads.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure methods on tasks, same prompts for all; resumes, and processes that share a folder share the work."""
    with user_errors("what was measured is kept: run the command again, and it goes on"):
        if not plugin:
            check_names(method or [])
        from longwave.evals.asked import read_method, suited
        from longwave.evals.evaluation import evaluate
        from longwave.evals.recipe import make_recipe
        from longwave.evals.stock import Quantized
        from longwave.methods import register_file

        for path in plugin or ():
            register_file(path)
        given = dict(
            out=out, model=model, limit=limit, seed=seed, max_tokens=max_tokens, question=question, chat=chat, data=data
        )
        given |= dict(device=device, dtype=dtype, batch=batch, batch_tokens=batch_tokens, profile=profile)
        given |= dict(extend_to=extend_to, extend_rule=extend_rule, window=window)
        wanted = make_recipe(recipe, methods=method or None, tasks=task or None, **given)
        command = shlex.join(["longwave", *sys.argv[1:]])

        def load(model: str, device: str, dtype: str) -> tuple[Any, Any]:
            source = Source(model, device, dtype, wanted.extend_to, wanted.extend_rule)
            suited(wanted, source.skeleton)
            for method, budget in map(read_method, wanted.methods):
                if not isinstance(method, Quantized):
                    source.check(method, budget)
            return source.load(), source.tokenizer

        with progress("samples x methods") as advance:
            results = evaluate(wanted, load, command, advance)
        for problem in results.problems:
            print(f"longwave: {problem}", file=sys.stderr)
        _show(wanted.out, as_json)


def check_names(specs: list[str]) -> None:
    """Raise ValueError for a method, or an option of one, that there is not: misspelt names are said before torch is
    imported."""
    known = {name: about.options for name, about in methods().items()}
    for spec in specs:
        name, options = parse_spec(spec)
        if name != STOCK:
            check_options(name, options.keys() - {"budget", *Sampling.__dataclass_fields__}, known, "method")


@app.command()
def ls(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """The tasks and methods there are, with their options."""
    from longwave.evals.stock import Quantized
    from longwave.evals.tasks import TASKS
    from longwave.methods import METHODS

    tasks: list[dict[str, Any]] = [
        {"task": name, "version": cls.version, "what": first_line(cls), "options": options_of(cls)}
        for name, cls in TASKS.items()
    ]
    methods: list[dict[str, Any]] = [
        {"method": name, "what": first_line(cls), "options": options_of(cls)}
        for name, cls in {**METHODS, Quantized.name: Quantized}.items()
    ]
    if as_json:
        show_json({"tasks": tasks, "methods": methods})
        return
    columns = ["task", "version", "what", "options"]
    show_table("tasks", columns, [[t["task"], t["version"], t["what"], ", ".join(t["options"])] for t in tasks])
    columns = ["method", "what", "options"]
    show_table("methods", columns, [[m["method"], m["what"], ", ".join(m["options"])] for m in methods])


@app.command()
def data(
    tasks: Annotated[list[str] | None, typer.Argument(metavar="[TASK]...", help="Of these tasks; else of all.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Data folder; else $LONGWAVE_DATA, else one that `eval run` looks for.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fetch the benchmarks' data from its own sources, each file checked by its sha256. What came before stays."""
    with user_errors("what came is kept: run the command again, and it goes on"):
        from longwave.evals.data import fetched_folder
        from longwave.evals.download import RECORD, chosen, download

        folder, wanted = out or fetched_folder(), chosen(tasks or [])
        with progress("bytes") as advance:
            came = download(wanted, folder, advance)
        if as_json:
            files = [{**asdict(source), "new": source in came} for source in wanted]
            show_json({"folder": str(folder), "files": files})
            return
        rows = []
        for task in dict.fromkeys(source.task for source in wanted):
            own = [source for source in wanted if source.task == task]
            licences = dict.fromkeys(source.licence for source in own)
            new = sum(source in came for source in own)
            rows.append([task, len(own), new, f"{sum(s.bytes for s in own):,}", " / ".join(licences)])
        show_table("data", ["task", "files", "new", "bytes", "licence, as its source states it"], rows)
        print(f"{folder} (addresses and digests: {folder / RECORD})")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of results; several are shown as one.")],
    out: Annotated[Path | None, typer.Option(help="Where report.html and report.md go; the first folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write report.html (one file, no network) and report.md from results."""
    with user_errors():
        from longwave.evals.report import write_report

        written = write_report(folders, out or folders[0])
        if as_json:
            show_json({"written": [str(path) for path in written]})
        else:
            print("\n".join(map(str, written)))


def _show(folder: Path, as_json: bool) -> None:
    """Mean scores of everything the folder holds."""
    from longwave.evals.results import load
    from longwave.evals.summary import summarise

    lines = summarise(load(folder))
    if as_json:
        show_json([line.as_dict() for line in lines])
        return
    rows = [[x.task, x.column, x.method, f"{x.value:.3f}", _ends(x.interval), x.count, f"{x.ratio:.3f}"] for x in lines]
    show_table("results", ["task", "set", "method", "score", "95 %", "samples", "bytes ratio"], rows)
    print(folder / "samples.jsonl")


def _ends(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else "{:.3f}..{:.3f}".format(*interval)
