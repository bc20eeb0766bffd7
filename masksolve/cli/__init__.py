"""The `masksolve` command."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masksolve import diversity
from masksolve._errors import NotInstalledError
from masksolve._methods import available_methods, extras_of_methods
from masksolve._pattern import Pattern
from masksolve._patterns import PatternsLike, as_patterns
from masksolve._tiles import DIRECTIONS, Direction
from masksolve._words import counted, one_sided
from masksolve.diversity._paper_formula import paper_formula
from masksolve.odds import choose_pattern, group_odds, row_odds, tile_odds

try:
    import click
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.table import Table
    from rich.text import Text

    from masksolve.checkpoint import (
        CheckpointBudget,
        CheckpointError,
        CheckReport,
        Comparison,
        PrunedTensor,
        PruneReport,
        SkippedTensor,
        WorkerLostError,
        apply_masks,
        budget_checkpoint,
        check_checkpoint,
        compare_checkpoints,
        dask_executor,
        pack_checkpoint,
        page,
        plan_checkpoint,
        prune_checkpoint,
        unpack_checkpoint,
    )
    from masksolve.checkpoint._file import printable
    from masksolve.checkpoint._run import OnProgress
except (ModuleNotFoundError, NotInstalledError) as error:
    sys.exit(f"the masksolve command needs {error.name}, which is not installed; pip install 'masksolve[cli]'")

if TYPE_CHECKING:
    from masksolve.checkpoint import CheckpointAdaPruneReport
    from masksolve.torch import AdaPruneReport, PermuteReport


class _PatternType(click.ParamType):  # type: ignore[type-arg] # in click 8.2 it takes none
    name = "N:M"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Pattern:
        try:
            return Pattern.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _NumberRange(click.FloatRange):
    """A range of numbers without NaN, which compares with no bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value} is not a number", param, ctx)
        return number


class _PatternsType(click.ParamType):  # type: ignore[type-arg]
    """A pattern, that of the names that a glob matches, or a file of those: one after the other, a glob and each."""

    name = "N:M, GLOB=N:M or FILE.toml"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Pattern | list[tuple[str, Pattern]]:
        glob, equals, pattern = str(value).rpartition("=")
        try:
            if equals:
                return [(glob, Pattern.parse(pattern))]
            if str(value).endswith(".toml"):
                return list(_patterns_in(Path(value)).items())
            return Pattern.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _patterns_in(path: Path) -> dict[str, Pattern]:
    try:
        with path.open("rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # its syntax, or its encoding
        raise ValueError(f"{path} is not TOML: {error}") from None
    if not found:
        raise ValueError(f"{path} holds no pattern; a line is a glob and its pattern, such as '*.mlp.*' = \"2:4\"")
    for glob, pattern in found.items():
        if not isinstance(pattern, str):
            raise ValueError(
                f"{path}: {glob} is {pattern!r}, not a pattern; a line is a glob and its pattern, such as "
                "'*.mlp.*' = \"2:4\", with quotes around both"
            )
    return {glob: Pattern.parse(pattern) for glob, pattern in found.items()}


def _joined(given: Sequence[Pattern | list[tuple[str, Pattern]]]) -> list[PatternsLike]:
    """Return the patterns that are each for all weights, and those of globs, which belong together."""
    by_glob = [pair for each in given if isinstance(each, list) for pair in each]
    twice = [glob for glob, count in Counter(glob for glob, _ in by_glob).items() if count > 1]
    if twice:
        raise click.UsageError(f"--pattern is given twice for {twice[0]!r}")
    patterns: list[PatternsLike] = [each for each in given if isinstance(each, Pattern)]
    return [*patterns, dict(by_glob)] if by_glob else patterns


def _one_of(given: Sequence[Pattern | list[tuple[str, Pattern]]]) -> PatternsLike | None:
    """Return the pattern or the patterns by globs that are given, if any."""
    joined = _joined(given)
    if len(joined) > 1:
        others = "; the pattern of all other weights is '*=N:M'" if isinstance(joined[-1], dict) else ""
        raise click.UsageError(f"--pattern is given as {joined[0]} and {as_patterns(joined[1])}; give one{others}")
    return joined[0] if joined else None


_pattern = click.option(
    "--pattern",
    type=_PatternsType(),
    required=True,
    multiple=True,
    callback=lambda ctx, param, value: _one_of(value),
    help="N entries KEPT of every M: 1:4 keeps 1 and zeroes 3. By layer: GLOB=N:M, repeated, of which the first "
    "whose glob matches counts, or a TOML file of lines 'GLOB' = \"N:M\".",
)
_include = click.option(
    "--include",
    multiple=True,
    metavar="GLOB",
    help="Only tensors whose name matches, embeddings, routers and the like among them; can be repeated.",
)
_exclude = click.option(
    "--exclude", multiple=True, metavar="GLOB", help="No tensors whose name matches; can be repeated."
)
_stack = click.option(
    "--stack",
    multiple=True,
    metavar="GLOB",
    help="Tensors of 3 or more axes that are stacks of matrices (..., rows, columns), such as a layer's experts.",
)
_transposed = click.option(
    "--transposed",
    multiple=True,
    metavar="GLOB",
    help="Tensors stored (in, out), not (out, in), of which one-sided masks run along the other axis.",
)
_convolution = click.option(
    "--convolution", multiple=True, metavar="GLOB", help="Tensors of 3 axes that are convolutions (out, in, kernel)."
)
_recorded_pattern = click.option(
    "--pattern",
    type=_PatternsType(),
    multiple=True,
    callback=lambda ctx, param, value: _one_of(value),
    help="N entries KEPT of every M, or GLOB=N:M as for `prune`.  [default: what the record says]",
)
_recorded_direction = click.option(
    "--direction",
    type=click.Choice(DIRECTIONS),
    help="both: transposable; rows, columns: one-sided.  [default: what the record says; both without one]",
)
_record = click.option(
    "--record",
    type=click.Path(path_type=Path),
    help="The record: the JSON report of the prune, or masksolve.json.  [default: masksolve.json in INPUT]",
)
_method = click.option(
    "--method",
    type=click.Choice(list(extras_of_methods())),
    default="exact",
    show_default=True,
    help="How to find the masks; see `masksolve methods`.",
)
_direction = click.option(
    "--direction",
    type=click.Choice(DIRECTIONS),
    default="both",
    show_default=True,
    help="both: transposable; rows: one-sided, N of every M inputs of an output; columns: of the outputs of an input.",
)
_overwrite = click.option(
    "--overwrite", is_flag=True, help="Replace an output that exists, and discard a run that was not finished."
)
_resume = click.option("--resume", is_flag=True, help="Continue a run that was not finished.")
_report = click.option(
    "--report", type=click.Path(path_type=Path), help="Write a report, as a page (.html) or as data (.json)."
)
_REPORTS = (".html", ".json")
_json_report = click.option(
    "--report", type=click.Path(path_type=Path), help="Write a report of every tensor, as data (.json)."
)
_workers = click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes to use.  [default: one per core, fewer for small checkpoints]",
)
_scheduler = click.option("--scheduler", metavar="tcp://HOST:PORT", help="Use the workers of this Dask cluster.")
_SECONDS_WITHOUT_WORKERS = 60.0
_timeout = click.option(
    "--timeout",
    type=_NumberRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Give up when the cluster has had no worker for this long.  [default: 60, with --scheduler]",
)


class _InterruptedError(Exception):
    """An interrupt on its way through click, which would print an empty line for it."""


class _ClosedError(Exception):
    """A closed stdout on its way through click, which would exit with 1, as for a check that failed."""


class _Commands(click.Group):
    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **options)
        except BrokenPipeError as error:  # of --help
            raise _ClosedError from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _InterruptedError from error
        except BrokenPipeError as error:
            raise _ClosedError from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="masksolve")
def cli() -> None:
    """Compute exact transposable N:M sparsity masks, and prove them optimal."""


@cli.command()
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@_pattern
@click.option("--output", type=click.Path(path_type=Path), help="The .safetensors file, or folder, to write.")
@click.option("--masks", type=click.Path(path_type=Path), help="The file of masks to write, a bit per weight.")
@_direction
@_method
@_include
@_exclude
@_stack
@_convolution
@_transposed
@_report
@_overwrite
@_resume
@_workers
@_scheduler
@_timeout
def prune(
    source: Path,
    pattern: PatternsLike,
    output: Path | None,
    masks: Path | None,
    direction: str,
    method: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    stack: tuple[str, ...],
    convolution: tuple[str, ...],
    transposed: tuple[str, ...],
    report: Path | None,
    overwrite: bool,
    resume: bool,
    workers: int | None,
    scheduler: str | None,
    timeout: float | None,
) -> None:
    """Prune the weight matrices of INPUT to transposable N:M.

    With --direction rows or columns, to one-sided N:M.

    INPUT is a .safetensors file, or a folder of them with an index, such as model.safetensors.index.json. Tensors that
    are not weight matrices are copied unchanged. Without --include, so are embeddings, output layers tied to them,
    routers of mixtures of experts and the like. A config.json beside the weights says which these are, if transformers
    is installed; otherwise their names do. Tensors of 3 axes are pruned only where the config, --stack or --convolution
    says what they are.
    """
    if output is None and masks is None:
        raise click.UsageError("nothing to write: pass --output, --masks, or both")
    _check_path("report", report, [source], [output, masks], overwrite, _REPORTS)
    with _progress() as on_progress, _who_works(workers, scheduler, timeout) as engine:
        result = prune_checkpoint(
            source,
            output,
            pattern,
            masks=masks,
            direction=direction,
            method=method,
            include=include,
            exclude=exclude,
            stack=stack,
            convolution=convolution,
            transposed=transposed,
            overwrite=overwrite,
            resume=resume,
            workers=engine,
            on_progress=on_progress,
        )
    _show(result, report)


@cli.command()
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.option("--masks", type=click.Path(path_type=Path), required=True, help="The file of masks to apply.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The file, or folder, to write.")
@click.option("--other-weights", is_flag=True, help="Accept weights that are not those the masks were made for.")
@_report
@_overwrite
@_resume
@_workers
@_scheduler
@_timeout
def apply(
    source: Path,
    masks: Path,
    output: Path,
    other_weights: bool,
    report: Path | None,
    overwrite: bool,
    resume: bool,
    workers: int | None,
    scheduler: str | None,
    timeout: float | None,
) -> None:
    """Prune INPUT by masks that `prune --masks` wrote.

    INPUT is a .safetensors file, or a folder of them with an index. The file of masks says the pattern and direction.
    """
    _check_path("report", report, [source], [output, masks], overwrite, _REPORTS)
    with _progress() as on_progress, _who_works(workers, scheduler, timeout) as engine:
        result = apply_masks(
            source,
            masks,
            output,
            other_weights=other_weights,
            overwrite=overwrite,
            resume=resume,
            workers=engine,
            on_progress=on_progress,
        )
    _show(result, report)


@cli.command()
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@_recorded_pattern
@_recorded_direction
@_include
@_exclude
@_stack
@_convolution
@_transposed
@_record
@_workers
@_scheduler
@_timeout
def check(
    source: Path,
    pattern: PatternsLike | None,
    direction: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    stack: tuple[str, ...],
    convolution: tuple[str, ...],
    transposed: tuple[str, ...],
    record: Path | None,
    workers: int | None,
    scheduler: str | None,
    timeout: float | None,
) -> None:
    """Check that the weight matrices of INPUT are N:M sparse.

    The exit code is 1 if one is not.

    The record that a prune leaves in a folder, masksolve.json, says which tensors were pruned, and to what. Without it,
    or with --include, --stack, --convolution or --transposed and no --record, those are checked that `masksolve prune`
    would prune.
    """
    with _progress() as on_progress, _who_works(workers, scheduler, timeout) as engine:
        result = check_checkpoint(
            source,
            pattern,
            direction=direction,
            include=include,
            exclude=exclude,
            stack=stack,
            convolution=convolution,
            transposed=transposed,
            record=record,
            workers=engine,
            on_progress=on_progress,
        )
    for tensor in result.tensors:
        click.echo(
            f"{'ok ' if tensor.problem is None else 'BAD'} {printable(tensor.name)}  {tensor.problem or ''}".rstrip()
        )
    _print_identified(result.identified_by)
    click.echo(f"{source}: {', '.join(_verdicts(result))}; {counted(len(result.skipped), 'tensor')} skipped")
    if result.passed:
        return
    if not result.recorded:
        click.echo("if a prune left them dense, --record with its JSON report checks what it pruned, and no others")
    raise click.exceptions.Exit(1)


@cli.command()
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The file, or folder, to write.")
@_recorded_pattern
@_recorded_direction
@_include
@_exclude
@_stack
@_convolution
@_transposed
@_record
@_json_report
@_overwrite
@_resume
@_workers
@_scheduler
@_timeout
def pack(
    source: Path,
    output: Path,
    pattern: PatternsLike | None,
    direction: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    stack: tuple[str, ...],
    convolution: tuple[str, ...],
    transposed: tuple[str, ...],
    record: Path | None,
    report: Path | None,
    overwrite: bool,
    resume: bool,
    workers: int | None,
    scheduler: str | None,
    timeout: float | None,
) -> None:
    """Pack INPUT, which is N:M sparse, into values and bits.

    Of each N:M tensor the output holds the kept values and a bit per weight that says where they are, as
    compressed-tensors' sparse-24-bitmask does for 2:4. `masksolve unpack` gives the same bytes back. What is N:M is
    found as by `masksolve check`; a tensor that is not stays as it is, with the reason.
    """
    _check_path("report", report, [source], [output], overwrite, (".json",))
    with _progress() as on_progress, _who_works(workers, scheduler, timeout) as engine:
        result = pack_checkpoint(
            source,
            output,
            pattern,
            direction=direction,
            include=include,
            exclude=exclude,
            stack=stack,
            convolution=convolution,
            transposed=transposed,
            record=record,
            overwrite=overwrite,
            resume=resume,
            workers=engine,
            on_progress=on_progress,
        )
    if report is not None:
        _write_whole(report, json.dumps(result.to_dict(), indent=2) + "\n")
    _print_skipped(result.skipped)
    table = Table("packed tensor", "shape", "pattern")
    table.add_column("share of its bytes", justify="right")
    for tensor in result.tensors:
        share = f"{tensor.packed_nbytes / tensor.dense_nbytes:.2%}"
        table.add_row(Text(printable(tensor.name)), _shape(tensor.shape), str(tensor.pattern), share)
    _print(table)
    _print_identified(result.identified_by)
    click.echo(
        f"{output}: {counted(len(result.tensors), 'tensor')} packed; {result.dense_nbytes:,} bytes of weights are "
        f"{result.packed_nbytes:,} now, {result.packed_nbytes / result.dense_nbytes:.2%}"
    )


@cli.command()
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The file, or folder, to write.")
@_overwrite
@_resume
@_workers
@_scheduler
@_timeout
def unpack(
    source: Path,
    output: Path,
    overwrite: bool,
    resume: bool,
    workers: int | None,
    scheduler: str | None,
    timeout: float | None,
) -> None:
    """Unpack INPUT, written by `pack`, to the same bytes."""
    with _progress() as on_progress, _who_works(workers, scheduler, timeout) as engine:
        result = unpack_checkpoint(
            source, output, overwrite=overwrite, resume=resume, workers=engine, on_progress=on_progress
        )
    click.echo(f"{output}: {counted(len(result.tensors), 'tensor')} unpacked, {result.dense_nbytes:,} bytes of weights")


def _verdicts(result: CheckReport) -> Iterator[str]:
    """Yield one for each pattern and direction that tensors were checked for."""
    for pattern, direction in dict.fromkeys((tensor.pattern, tensor.direction) for tensor in result.tensors):
        problems = [each.problem for each in result.tensors if (each.pattern, each.direction) == (pattern, direction)]
        bad, count = sum(problem is not None for problem in problems), len(problems)
        described = (
            f"transposable {pattern.describe()}" if direction == "both" else f"{pattern.describe()} along {direction}"
        )
        if count == 1:
            yield f"1 tensor is {'not ' if bad else ''}{described}"
        else:
            yield f"{f'{bad} of {count} tensors are not' if bad else f'all {count} tensors are'} {described}"


@cli.command("permute")
@click.argument("source", metavar="FOLDER", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--pattern", type=_PatternType(), required=True, help="N entries KEPT of every M of the later masks.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@_direction
@click.option(
    "--time-limit",
    type=_NumberRange(min=0, min_open=True),
    metavar="SECONDS",
    help="For each axis; what is found then depends on the machine.  [default: none]",
)
@click.option(
    "--escapes",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="How often to go on from a random exchange when nothing gains any more.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@_overwrite
@_resume
def permute_folder(
    source: Path,
    pattern: Pattern,
    output: Path,
    direction: Any,
    time_limit: float | None,
    escapes: int,
    seed: int,
    overwrite: bool,
    resume: bool,
) -> None:
    """Reorder channels inside a dense model so that its best N:M masks keep more, before `prune` or `adaprune`.

    The model computes what it did: hidden axes of feed-forward blocks and experts, and value channels within heads, are
    put in another order in all weights that share them, one block in memory at a time; each block is run on random
    tokens before and after. The report is permute.json in the folder.
    """
    with Console(stderr=True).status(f"loading {escape(str(source))}"):
        try:
            from masksolve.checkpoint import NoStackError, permute_checkpoint
        except ModuleNotFoundError as error:
            raise NotInstalledError(
                f"masksolve permute needs {error.name}, which is not installed; pip install 'masksolve[torch]'"
            ) from error
    try:
        with _progress() as on_progress, _as_usage_errors():
            report = permute_checkpoint(
                source,
                output,
                pattern,
                direction=direction,
                time_limit=time_limit,
                escapes=escapes,
                seed=seed,
                overwrite=overwrite,
                resume=resume,
                on_progress=on_progress,
            )
    except NoStackError as error:
        raise click.UsageError(str(error)) from error
    _print_permuted(report, output, direction)


@cli.command("adaprune")
@click.argument("source", metavar="FOLDER|MODULE:FACTORY")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    required=True,
    help="Text, one sample per line; for module:factory .npy or .safetensors. Can be repeated.",
)
@_pattern
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option(
    "--importance",
    type=click.Choice(["magnitude", "wanda", "ria", "hessian", "sparsegpt", "admm"]),
    default="magnitude",
    show_default=True,
    help="What to keep most of.",
)
@_direction
@click.option(
    "--solver",
    type=click.Choice(["lstsq", "adam", "absorb", "none"]),
    default="lstsq",
    show_default=True,
    help="How to re-fit the weights that are kept.",
)
@click.option(
    "--refine", type=click.Choice(["block"]), help="Train what each block keeps, once its layers are re-fitted."
)
@_include
@_exclude
@click.option(
    "--all-layers",
    "keep_first_last",
    flag_value=False,
    type=bool,
    default=True,
    help="Prune the first and the last layer too.",
)
@click.option(
    "--min-tokens",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Experts that fewer tokens reach are pruned, but not re-fitted.",
)
@click.option("--samples", type=click.IntRange(1), default=256, show_default=True, help="At most this many samples.")
@click.option(
    "--length", type=click.IntRange(1), default=128, show_default=True, help="At most this many tokens per line."
)
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Samples per batch.")
@click.option(
    "--inputs",
    type=click.Choice(["pruned", "dense"]),
    default="pruned",
    show_default=True,
    help="pruned: re-fit layers on inputs from the model as pruned so far; dense: from the dense model, several blocks "
    "at a time.",
)
@_report
@_overwrite
@_resume
@_workers
@_scheduler
@_timeout
def adaprune_model(
    source: str,
    calibration: tuple[Path, ...],
    pattern: PatternsLike,
    output: Path,
    importance: Any,
    direction: Any,
    solver: Any,
    refine: Any,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    keep_first_last: bool,
    min_tokens: int,
    samples: int,
    length: int,
    batch: int,
    inputs: Any,
    report: Path | None,
    overwrite: bool,
    resume: bool,
    workers: int | None,
    scheduler: str | None,
    timeout: float | None,
) -> None:
    """Prune a model to N:M, and re-fit each layer on a few inputs.

    The model is a pretrained one, the inputs need no labels: a Hugging Face folder, of which one block at a time is in
    memory, or what a function of your own returns. Models of folders that are not a stack of blocks are loaded whole.

    The folder gets the shards of the model (from code: model.safetensors), the other files beside them but for weights
    in other formats, the report adaprune.json, and masksolve.json, which says for `masksolve check` what was pruned.
    After Ctrl-C --resume continues; of a model that is loaded whole, what is finished is written.
    """
    _check_path("report", report, [Path(source), *calibration], [output], overwrite, _REPORTS)
    # The status is shown before torch is imported: that and the model take a while.
    with Console(stderr=True).status(f"loading {escape(source)}"):
        try:
            from masksolve.checkpoint import NoStackError, adaprune_checkpoint
            from masksolve.cli._models import (
                call_factory,
                load_folder,
                load_tokenizer,
                new_folder,
                read_batches,
                save_model,
            )
            from masksolve.torch import adaprune
        except ModuleNotFoundError as error:
            raise NotInstalledError(
                f"masksolve adaprune needs {error.name}, which is not installed; pip install 'masksolve[torch]'"
            ) from error

    options: dict[str, Any] = {
        "importance": importance,
        "direction": direction,
        "solver": solver,
        "refine": refine,
        "include": include or None,
        "exclude": exclude or None,
        "keep_first_last": keep_first_last,
        "min_tokens": min_tokens,
    }
    given = {"--overwrite": overwrite, "--resume": resume, "--workers": workers, "--scheduler": scheduler}
    by_block = [flag for flag, value in given.items() if value]
    is_folder = Path(source).is_dir()
    if is_folder and inputs == "pruned" and (workers or scheduler):
        raise click.UsageError(f"{by_block[-1]} needs --inputs dense; with pruned inputs, blocks follow one another")

    def read(tokenizer: Any) -> list[Any]:
        return read_batches(calibration, tokenizer, samples=samples, length=length, size=batch)

    if is_folder:
        with Console(stderr=True).status(f"loading {escape(source)}"):
            tokenizer = load_tokenizer(Path(source))
            batches = read(tokenizer)
        try:
            with _progress() as on_progress, _who_works(workers, scheduler, timeout) as engine, _as_usage_errors():
                streamed = adaprune_checkpoint(
                    Path(source),
                    output,
                    batches,
                    pattern,
                    inputs=inputs,
                    overwrite=overwrite,
                    resume=resume,
                    workers=engine,
                    on_progress=on_progress,
                    **options,
                )
        except NoStackError as error:
            click.echo(f"{source} is not pruned block by block but loaded as a whole: {error.__cause__}", err=True)
        else:
            if report is not None:
                _write_report(report, streamed)
            _print_adapruned(streamed.report, output, pattern)
            click.echo(
                f"peak memory {_size(streamed.peak)}; the weights of the largest block are "
                f"{_size(streamed.largest_block)}, the hidden states on the disk {_size(streamed.activations)}"
            )
            return
    if by_block:
        raise click.UsageError(f"{by_block[0]} is for folders that are pruned block by block, which {source} is not")
    with new_folder(output) as folder:
        with Console(stderr=True).status(f"loading {escape(source)}"):
            loaded = load_folder(Path(source), tokenizer) if is_folder else call_factory(source)
            batches = batches if is_folder else read(None)
        with _as_usage_errors():
            found = adaprune(loaded.model, batches, pattern, sequential=inputs == "pruned", progress=True, **options)
        save_model(loaded, found, direction, folder)
    if report is not None:
        _write_report(report, found)
    _print_adapruned(found, output, pattern)
    if found.interrupted:
        click.echo("masksolve: interrupted; the layers above are done, the others as they were", err=True)
        raise click.exceptions.Exit(130)


@cli.command()
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.option(
    "--pattern",
    "patterns",
    type=_PatternsType(),
    multiple=True,
    default=["2:4", "4:8", "8:16", "16:32"],
    show_default=True,
    callback=lambda ctx, param, value: _joined(value),
    help="N entries KEPT of every M, a plan for each. By layer: GLOB=N:M, all of them one more plan.",
)
@_direction
@_method
@_include
@_exclude
@_stack
@_convolution
@_transposed
@_workers
def plan(
    source: Path,
    patterns: list[PatternsLike],
    direction: str,
    method: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    stack: tuple[str, ...],
    convolution: tuple[str, ...],
    transposed: tuple[str, ...],
    workers: int | None,
) -> None:
    """Report what `prune` would do to INPUT, and what it would cost.

    That is time, memory and bytes on the disk. Nothing is written.
    """
    result = plan_checkpoint(
        source,
        patterns,
        direction=direction,
        method=method,
        include=include,
        exclude=exclude,
        stack=stack,
        convolution=convolution,
        transposed=transposed,
        workers=workers,
    )
    table = Table("tensor", "dtype", "shape")
    reasons = []
    for each in result.plans:
        table.add_column(Text(str(as_patterns(each.pattern))))
        reasons.append({tensor.name: tensor.reason for tensor in each.skipped})
    for tensor in result.tensors:
        fits = [Text(_with_flags(found.get(tensor.name, "fits"))) for found in reasons]
        table.add_row(Text(printable(tensor.name)), tensor.dtype, _shape(tensor.shape), *fits)
    _print(table)
    for each in result.plans:
        weights = sum(math.prod(tensor.shape) for tensor in each.chosen)
        memory = "" if each.memory is None else f", {each.memory / 2**20:.0f} MiB of memory"
        click.echo(
            f"{as_patterns(each.pattern).describe()}{one_sided(each.direction)}: "
            f"{len(each.chosen)} of {len(result.tensors)} tensors, {counted(weights, 'weight')}; "
            f"about {_duration(each.seconds)}{memory} with {counted(each.workers, 'worker')}; "
            f"writes {each.nbytes:,} bytes"
        )
    for pattern, reason in result.misfits.items():
        click.echo(_with_flags(f"{pattern}: {reason}"))
    _print_identified(result.identified_by)
    click.echo("times are measured on a sample; what the disk needs to write is not in them")


@cli.command()
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.option("--m", type=click.IntRange(1), required=True, help="Length of a group, the M of every tensor's N:M.")
@click.option(
    "--density",
    type=_NumberRange(0, 1, min_open=True),
    required=True,
    help="The share of these tensors' weights to keep, at most.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="The .toml file to write, for `prune --pattern`."
)
@click.option("--least", type=click.IntRange(0), default=1, show_default=True, help="The smallest N of a tensor.")
@click.option("--most", type=click.IntRange(0), help="The largest N of a tensor.  [default: M, which is dense]")
@_direction
@_include
@_exclude
@_stack
@_convolution
@_transposed
@click.option("--report", type=click.Path(path_type=Path), help="Write the figures behind the choice (.json).")
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@_workers
@_scheduler
@_timeout
def budget(
    source: Path,
    m: int,
    density: float,
    output: Path,
    least: int,
    most: int | None,
    direction: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    stack: tuple[str, ...],
    convolution: tuple[str, ...],
    transposed: tuple[str, ...],
    report: Path | None,
    overwrite: bool,
    workers: int | None,
    scheduler: str | None,
    timeout: float | None,
) -> None:
    """Choose N of M for each weight matrix of INPUT.

    All of them together keep at most the density, and the most importance that is possible with it: no other choice
    keeps more. Each matrix is solved for every N, which takes about M times as long as to prune it. Tensors that
    `prune` skips do not count; pass it the same options beside `--pattern OUTPUT`.
    """
    _check_path("output", output, [source], [], overwrite, (".toml",))
    _check_path("report", report, [source], [output], overwrite, (".json",))
    with _progress() as on_progress, _who_works(workers, scheduler, timeout) as engine:
        result = budget_checkpoint(
            source,
            m,
            density,
            least=least,
            most=most,
            direction=direction,
            include=include,
            exclude=exclude,
            stack=stack,
            convolution=convolution,
            transposed=transposed,
            workers=engine,
            on_progress=on_progress,
        )
    if report is not None:
        _write_whole(report, json.dumps(result.to_dict(), indent=2) + "\n")
    _write_whole(output, _toml_of(result))
    _print_skipped(result.skipped)
    _print_chosen(result)
    _print_identified(result.identified_by)
    found = result.budget
    beside = (
        ""
        if found.uniform is None
        else f"; {result.uniform_kept_importance:.2%} with {found.uniform.describe()} for all"
    )
    click.echo(
        f"{output}: {counted(len(result.tensors), 'tensor')} get {found.least} to {found.most} of {found.m}"
        f"{one_sided(result.direction)}, density {found.density:.6g} (asked for {found.asked:g}), "
        f"kept importance of all {result.kept_importance:.2%}{beside}"
    )


def _toml_of(result: CheckpointBudget) -> str:
    """Return the patterns as the file that --pattern reads."""
    found = result.budget
    lines = [
        f"# N of {found.m}{one_sided(result.direction)} for a density of {found.asked:g}: it is {found.density:.6g}, "
        f"and {result.kept_importance:.2%} of the importance is kept.",
        *(f'{_quoted(glob)} = "{pattern}"' for glob, pattern in result.patterns.items()),
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Return a string as TOML has it; JSON differs in one character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _print_chosen(result: CheckpointBudget) -> None:
    table = Table("tensor", "shape")
    for heading in ("pattern", "kept importance"):
        table.add_column(heading, justify="right")
    for tensor, layer, importance in zip(result.tensors, result.budget.layers, result.importance, strict=True):
        kept = layer.values[layer.pattern.n - result.budget.least] / importance if importance > 0 else 1.0
        table.add_row(Text(printable(tensor.name)), _shape(tensor.shape), str(tensor.pattern), f"{kept:.2%}")
    _print(table)


@cli.command()
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="B", type=click.Path(path_type=Path))
@_report
@click.option("--overwrite", is_flag=True, help="Replace a report that exists.")
@_workers
@_scheduler
@_timeout
def compare(
    first: Path,
    second: Path,
    report: Path | None,
    overwrite: bool,
    workers: int | None,
    scheduler: str | None,
    timeout: float | None,
) -> None:
    """Show what differs between the checkpoints A and B."""
    _check_path("report", report, [first, second], [], overwrite, _REPORTS)
    with _progress() as on_progress, _who_works(workers, scheduler, timeout) as engine:
        result = compare_checkpoints(first, second, workers=engine, on_progress=on_progress)
    if report is not None:
        _write_report(report, result)
    changed = [tensor for tensor in result.tensors if not tensor.is_same]
    if changed:
        table = Table("tensor", "difference")
        for heading in ("changed", "made zero", "zeros before", "zeros after", "importance kept"):
            table.add_column(heading, justify="right")
        for tensor in changed:
            if tensor.difference is not None:
                table.add_row(Text(printable(tensor.name)), Text(tensor.difference))
                continue
            before, after = tensor.importance
            shares = (count / tensor.entries for count in (tensor.changed, tensor.zeroed, *tensor.zeros))
            kept = f"{after / before:.2%}" if before > 0 else ""
            table.add_row(Text(printable(tensor.name)), "values", *(f"{share:.2%}" for share in shares), kept)
        _print(table)
    for file in result.files:
        click.echo(printable(file))
    click.echo(
        f"{len(changed)} of {len(result.tensors)} tensors differ, and {counted(len(result.files), 'file')} beside them"
    )


@cli.command()
def methods() -> None:
    """List the methods, preferred first, and how to install them."""
    installed = available_methods()
    for name, extra in extras_of_methods().items():
        how = "installed" if name in installed else f"pip install 'masksolve[{extra}]'"
        click.echo(f"{name:<12} {how}")


@cli.command("diversity")
@click.argument("pattern", metavar="N:M", type=_PatternType())
def show_diversity(pattern: Pattern) -> None:
    """Count the N:M masks of an M x M tile."""
    n, m = pattern.n, pattern.m
    transposable = diversity.log2_count(n, m)
    formula = math.log2(paper_formula(n, m))
    click.echo(f"masks of one {m}x{m} tile, {pattern.describe()}:")
    _print_masks("transposable", m, diversity.count(n, m) if transposable.exact else transposable.value)
    try:
        _print_masks(f"transposable, at most {n} per line", m, diversity.count(n, m, saturated=False))
    except ValueError:
        click.echo(f"{f'transposable, at most {n} per line':<32} too many to count")
    _print_masks("one-sided", m, diversity.count(n, m, direction="rows"))
    _print_masks("unstructured", m, diversity.mask_diversity(pattern, m * m, direction="unstructured"))
    _print_masks("the paper's formula", m, paper_formula(n, m))
    ratio = _from_log2(formula - transposable.value)
    click.echo(f"the paper's formula is {ratio} times the number of transposable masks")
    if transposable.error is None:
        click.echo("the number of transposable masks is the asymptotic formula's")
    else:
        click.echo(f"the asymptotic formula is {_from_log2(transposable.error)} times that number")


@cli.command()
@click.option(
    "--sparsity", type=_NumberRange(0, 1), required=True, help="The share of weights that are zero, such as 0.7."
)
@click.option(
    "--pattern", type=_PatternType(), required=True, help="N entries KEPT of every M: 1:4 keeps 1 and zeroes 3."
)
@click.option("--length", type=click.IntRange(1), default=1024, show_default=True, help="How many weights a row has.")
def odds(sparsity: float, pattern: Pattern, length: int) -> None:
    """Print the odds that unstructured zeros are N:M already."""
    n, m = pattern.n, pattern.m
    row = row_odds(sparsity, n, m, length)
    try:
        tile = tile_odds(sparsity, n, m, rng=0)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    estimated = "" if tile.exact else f", estimated: {tile.low:.4g} to {tile.high:.4g} (95 %)"
    click.echo(f"weights zero with probability {sparsity}, each on its own; the odds of {pattern.describe()}:")
    click.echo(f"{f'a group of {m}':<32} {group_odds(sparsity, n, m):.4g}")
    click.echo(f"{f'a row of {length}':<32} {row:.4g}")
    click.echo(f"{f'a tile of {m}x{m}, transposable':<32} {tile.value:.4g}{estimated}")
    chosen = choose_pattern(sparsity, m)
    click.echo(f"a group fits with odds of 0.95 or more, as AdaPrune asks: {chosen.describe()}")


def _print_masks(constraint: str, m: int, masks: int | float) -> None:
    """Print one line; `masks` is a number, or its base-2 logarithm where it is a float."""
    log2 = masks if isinstance(masks, float) else math.log2(masks)
    number = f"{masks:,}" if isinstance(masks, int) and log2 < 200 else _from_log2(log2)
    click.echo(f"{constraint:<32} {log2 / m**2:.4f} bits per weight   {number}")


def _from_log2(log2: float) -> str:
    """Format 2**log2 with four digits, also where it is beyond float64."""
    exponent, fraction = divmod(log2 * math.log10(2), 1)
    return f"{10**fraction:.3f}e{exponent:.0f}" if log2 > 20 else f"{2**log2:.4g}"


def main() -> int:
    """Run the command and return its exit code.

    0 done, 1 check failed, 2 bad usage or input, 130 interrupted, 141 nobody reads what it prints (what it was to write
    is written).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of tensors and files may hold what the terminal cannot show; no run shall end in that.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = cli.main(prog_name="masksolve", standalone_mode=False) or 0
        _flush()
        return int(code)
    except (_ClosedError, BrokenPipeError):
        return 141
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        return _fail(error.format_message(), error)
    except (CheckpointError, NotInstalledError, WorkerLostError, OSError) as error:
        # Of what the user gave, or of this machine. Any other error is a bug, and shows where.
        return _fail(str(error), error)
    except (_InterruptedError, click.Abort, KeyboardInterrupt) as error:
        _fail("interrupted", error.__cause__ or error, "nothing was written")
        return 130


def _flush() -> None:
    """Flush stdout while an error can still be reported: Python's own flush at the end comes too late for that."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for Python to flush at the end)
        raise


def _fail(message: str, error: BaseException, otherwise: str | None = None) -> int:
    """Print one line: what happened, and the notes on what is kept."""
    notes = getattr(error, "__notes__", [otherwise] if otherwise else [])
    click.echo(_with_flags("; ".join([f"masksolve: {message}", *notes])), err=True)
    return 2


def _with_flags(message: str) -> str:
    """Return a message of the library with the command's flags: --overwrite where it says `overwrite=True`.

    The library names parameters between backticks, so that names of files and tensors are never taken for one.
    """
    flags = {
        option.name: option.opts[0]
        for command in cli.commands.values()
        for option in command.params
        if isinstance(option, click.Option)
    }
    return re.sub(r"`(\w+)(=True|=False)?`", lambda match: flags.get(match[1], match[0]), message)


def _check_path(
    what: str,
    path: Path | None,
    inputs: Sequence[Path],
    outputs: Sequence[Path | None],
    overwrite: bool,
    kinds: Sequence[str],
) -> None:
    """Refuse a report, or another file, that could not be written before any work is done."""
    if path is None:
        return
    # Not `resolve`, which raises for links that lead in a circle before Python 3.13.
    real, *known = (Path(os.path.realpath(each)) for each in (path, *inputs, *outputs) if each is not None)
    if real in known:
        raise click.UsageError(f"the {what} {path} is the input or the output; name another file")
    if any(folder in real.parents for folder in known[: len(inputs)]):
        raise click.UsageError(f"the {what} {path} lies in the input; name a file elsewhere")
    if path.is_dir():
        raise click.UsageError(f"the {what} {path} is a folder; name a file in it")
    if path.suffix not in kinds:
        wrong = (
            f"neither {' nor '.join(kinds)}; name it with one of them" if kinds[1:] else f"not {kinds[0]}; name it so"
        )
        raise click.UsageError(f"the {what} {path} is {wrong}")
    if path.exists() and not overwrite:
        raise click.UsageError(f"the {what} {path} exists; name another file, or pass --overwrite")
    if not path.parent.is_dir():
        raise click.UsageError(f"the {what}'s folder {path.parent} does not exist; create it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise click.UsageError(f"the {what} {path} is not writable")


def _write_report(path: Path, result: PruneReport | Comparison | CheckpointAdaPruneReport | AdaPruneReport) -> None:
    """Write a report as its name says, as a page or as data."""
    _write_whole(path, page(result) if path.suffix == ".html" else json.dumps(result.to_dict(), indent=2) + "\n")


def _write_whole(path: Path, content: str) -> None:
    """Write a file that has its name only when all of it is on the disk."""
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _who_works(workers: int | None, scheduler: str | None, timeout: float | None) -> Iterator[int | Executor | None]:
    if scheduler is None:
        if timeout is not None:
            raise click.UsageError("--timeout is for the workers of a cluster; pass --scheduler with it")
        yield workers
        return
    if workers is not None:
        raise click.UsageError("--workers starts processes here, --scheduler uses those of a cluster; pass one of them")
    with dask_executor(scheduler, timeout=_SECONDS_WITHOUT_WORKERS if timeout is None else timeout) as executor:
        yield executor


@contextmanager
def _as_usage_errors() -> Iterator[None]:
    """Raise what is wrong with a model, globs or calibration data that do not go together as a usage error."""
    try:
        yield
    except CheckpointError:  # `main` knows it
        raise
    except ValueError as error:
        usage = click.UsageError(str(error))
        for note in getattr(error, "__notes__", []):
            usage.add_note(note)
        raise usage from error


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """Yield what to call with the bytes that are done: a bar on a terminal. The log goes to stderr, above the bar."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # A layer of adaprune may take minutes, so that the speed is estimated over several.
    progress = Progress(*columns, console=console, transient=True, speed_estimate_period=300)
    # Not `disable`: before rich 14.3 a bar that is disabled ends in an empty line.
    with progress if console.is_terminal else nullcontext():
        task = progress.add_task("", total=None)
        phases = [""]

        def on_progress(phase: str, done: int, total: int) -> None:
            if phase != phases[-1]:
                # Each phase has a speed of its own.
                progress.reset(task, description=phase, total=total, completed=done)
                phases.append(phase)
            progress.update(task, completed=done)

        handler = logging.StreamHandler()
        logger = logging.getLogger("masksolve")
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield on_progress
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)


def _show(result: PruneReport, report: Path | None) -> None:
    """Print what was done, and write the report of it."""
    try:
        _write_and_print(result, report)
    except (KeyboardInterrupt, OSError) as error:
        error.add_note(f"{result.output or result.masks} is written, and complete")
        raise


def _write_and_print(result: PruneReport, report: Path | None) -> None:
    if report is not None:
        _write_report(report, result)
    _print_skipped(result.skipped)
    _print_pruned(result.tensors)
    _print_identified(result.identified_by)
    proof = "every tile proven optimal" if result.optimal else "not every tile is optimal, see the gaps"
    goals = " and ".join(f"{pattern.describe()}{one_sided(direction)}" for pattern, direction in result.goals)
    click.echo(
        f"{result.output or result.masks}: {counted(len(result.tensors), 'tensor')} pruned to {goals}, "
        f"mean kept importance {result.mean_kept_importance:.2%}, {proof}"
    )


def _print_identified(by: str) -> None:
    click.echo(f"tensors were identified by {printable(by)}")


def _print_skipped(skipped: Sequence[SkippedTensor]) -> None:
    if not skipped:
        return
    table = Table("skipped tensor", "shape", "reason")
    for tensor in skipped:
        table.add_row(Text(printable(tensor.name)), _shape(tensor.shape), Text(_with_flags(tensor.reason)))
    _print(table)


def _print_pruned(tensors: Sequence[PrunedTensor]) -> None:
    table = Table("pruned tensor", "shape")
    for heading in ("kept importance", "gap", "time"):
        table.add_column(heading, justify="right")
    for tensor in tensors:
        gap = "0 (optimal)" if tensor.optimal else f"{tensor.gap:.2e}"
        table.add_row(
            Text(printable(tensor.name)),
            _shape(tensor.shape),
            f"{tensor.kept_importance:.2%}",
            gap,
            f"{tensor.solve_seconds * 1e3:.0f} ms",
        )
    _print(table)


def _print_adapruned(report: AdaPruneReport, output: Path, pattern: PatternsLike) -> None:
    table = Table("skipped parameter", "shape", "reason")
    for line in report.skipped:
        if len(line.shape) > 1:
            table.add_row(Text(printable(line.name)), _shape(line.shape), Text(_with_flags(line.reason or "")))
    if table.row_count:
        _print(table)
    table = Table("pruned layer", "shape")
    for heading in ("kept importance", "error", "repaired", "time"):
        table.add_column(heading, justify="right")
    for layer in report.layers:
        errors = (f"{layer.error_before:.2%}", f"{layer.error_after:.2%}")
        table.add_row(
            Text(printable(layer.name)),
            _shape(layer.shape),
            f"{layer.kept_importance:.2%}",
            *errors,
            f"{layer.seconds * 1e3:.0f} ms",
        )
    _print(table)
    table = Table("refined block")
    for heading in ("error", "refined", "time"):
        table.add_column(heading, justify="right")
    for block in report.blocks:
        errors = (f"{block.error_before:.2%}", f"{block.error_after:.2%}")
        table.add_row(Text(printable(block.name)), *errors, f"{block.seconds:.1f} s")
    if table.row_count:
        _print(table)
    goal = f"{as_patterns(pattern).describe()}{one_sided(report.direction)}"
    click.echo(f"{output}: {counted(len(report.layers), 'layer')} pruned to {goal} in {report.seconds:.1f} s")


def _print_permuted(report: PermuteReport, output: Path, direction: Direction) -> None:
    table = Table("axis", "kind", "length")
    for heading in ("kept importance", "reordered", "time"):
        table.add_column(heading, justify="right")
    table.add_column("left as it was")
    for axis in report.axes:
        kept = ("", "") if axis.reason else (f"{axis.kept_before:.2%}", f"{axis.kept_after:.2%}")
        name, time = Text(printable(axis.name)), f"{axis.seconds:.1f} s"
        table.add_row(name, axis.kind, str(axis.length), *kept, time, Text(axis.reason or ""))
    _print(table)
    moved = [axis for axis in report.axes if axis.reason is None]
    gain = sum(axis.kept_after - axis.kept_before for axis in moved) / max(1, len(moved))
    click.echo(
        f"{output}: {len(moved)} of {len(report.axes)} axes reordered for {report.pattern.describe()}"
        f"{one_sided(direction)}, mean gain {100 * gain:.2f} points of kept importance; on random tokens the outputs "
        f"of blocks change by {report.deviation:.1e} of their norm"
    )


_ANY_WIDTH = 1 << 20


def _print(table: Table) -> None:
    # A file or a pipe has no width to fit, so nothing is cut there.
    console = Console() if sys.stdout.isatty() else Console(width=_ANY_WIDTH)
    # Printed by click: rich ends the process with 1 if nobody reads.
    with console.capture() as printed:
        console.print(table)
    click.echo(printed.get(), nl=False, color=console.color_system is not None)


def _duration(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds // 60 % 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {seconds % 60:.0f} s"
        if minutes
        else f"{seconds:.1f} s"
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 1 << 30 else f"{count / 2**20:.1f} MiB"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
