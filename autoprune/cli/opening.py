"""Beginning, resuming and opening runs, with other processes kept out meanwhile.

Part of the composition root: heavy imports happen inside the functions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from autoprune.cli.options import pick, settings_of
from autoprune.cli.stages import Job
from autoprune.config import OutputConfig

if TYPE_CHECKING:
    from autoprune.pipeline.context import RunContext
    from autoprune.runs import RunFolder

KEPT_OPTIONS = ("method", "baselines", "allocation")
"""Options that are no settings, but that a run which goes on should remember."""


@contextmanager
def start(options: Namespace, prepare: Callable[["RunContext"], None]) -> Iterator[Job]:
    """A new run, or the one to resume; no other process gets at it in the block.

    Args:
        options: Those of `autoprune.cli.options.search_options`.
        prepare: Finds everything that can be wrong before the folder is made.

    Yields:
        The run.

    Raises:
        UserError: If something is wrong; nothing is written then.
    """
    from autoprune.cli.checks import check_new, check_settings
    from autoprune.pipeline.changes import change_settings, changes
    from autoprune.runs import RunFolder, check_free, new_run

    settings = settings_of(options)
    output = pick(options, OutputConfig)
    # From fast to slow: names in an instant, then network and images. The folder comes
    # last, so that a refused command leaves nothing behind.
    check_settings(settings)
    check_new(settings, output)
    if output.resume and output.out is not None:
        folder = RunFolder.open(output.out, "out")
        # Before anything of it is read, which another process might be changing.
        with _held(folder, "out"):
            changed = changes(folder, settings)
            _check_kept_options(options, folder)
            from autoprune.pipeline.context import Parts, RunContext

            # Measuring the order of blocks anew would take long, and could break a tie
            # otherwise.
            parts = Parts.stored_in(folder.read_config())
            context = RunContext(
                settings,
                blocks=folder.blocks,
                latency=folder.latency_model,
                parts=parts,
            )
            prepare(context)
            change_settings(folder, settings, changed)
            yield _begin(context, folder, output, options)
        return
    # Once more under the lock; here, so that nobody waits for network and images first.
    check_free(output.out)
    # Only here, after all that needs no PyTorch.
    from autoprune.pipeline.context import RunContext

    context = RunContext(settings)
    prepare(context)
    kept = _kept_options(options)
    with new_run(settings, output.out, kept, context.facts) as (folder, is_locked):
        _warn_unless(is_locked, folder)
        yield _begin(context, folder, output, options)


def _begin(
    context: "RunContext", folder: "RunFolder", output: OutputConfig, options: Namespace
) -> Job:
    # Beside the settings, which hold what the method stands for but not its name.
    if options.method:
        folder.add_results(method=options.method)
    return Job(context, folder, output)


def _kept_options(options: Namespace) -> dict[str, Any]:
    """Of the options those of `KEPT_OPTIONS` that the command has."""
    return {name: options[name] for name in KEPT_OPTIONS if name in options}


def _check_kept_options(options: Namespace, folder: "RunFolder") -> None:
    """Refuses to go on with a run under another method, or with another allocation."""
    from autoprune.runs import other_than_stored

    stored = folder.read_config().get("options", {})
    # The others of `KEPT_OPTIONS` may change; runs of earlier versions hold none.
    for name in ("method", "allocation"):
        if name in stored and name in options and stored[name] != options[name]:
            raise other_than_stored(name, folder, stored[name], options[name])


def check_latency(context: "RunContext") -> None:
    """Finds what can be wrong with the engine that latency is measured in.

    Args:
        context: A run that is about to begin.

    Raises:
        UserError: If something is.
    """
    from autoprune.latency.engines import check_setting, setting_of
    from autoprune.latency.samples import check_batch

    setting = setting_of(context.settings.latency)
    check_setting(setting)
    check_batch(context.dense, context.splits.example, setting.batch)


def prepare(context: "RunContext") -> None:
    """Finds what can be wrong with network, images and budget.

    Args:
        context: Those of a run that is about to begin.

    Raises:
        UserError: If something is.
    """
    from autoprune.cli.search_stage import make_env
    from autoprune.pipeline.methods.registry import method_of

    check_latency(context)
    method = method_of(context.settings)
    if method.is_searched(context.settings):
        # Made for its refusals and dropped; the search makes its own.
        make_env(context)
    method.check(context)


def open_run(run: str) -> Job:
    """An existing run, to be read; who writes into it takes `hold_run`.

    Args:
        run: Its folder.

    Raises:
        UserError: If it is none, or its sparse training isn't done.
    """
    from autoprune.pipeline.context import RunContext
    from autoprune.runs import RunFolder

    folder = RunFolder.open(run)
    return Job(RunContext.of_run(folder), folder)


@contextmanager
def hold_run(run: str) -> Iterator[Job]:
    """An existing run; no other process gets at it in the block.

    Args:
        run: Its folder.

    Yields:
        The run.

    Raises:
        UserError: If it is none, another process works on it, or its sparse training
            isn't done.
    """
    from autoprune.runs import RunFolder

    with _held(RunFolder.open(run), "run"):
        yield open_run(run)


@contextmanager
def hold_place_of(path: Path) -> Iterator[None]:
    """Holds the run folder that a file is to be written into, if it is one.

    Args:
        path: The file.

    Raises:
        UserError: If another process works on that run.
    """
    from autoprune.runs import RunFolder

    folder = RunFolder(path.parent)
    # Other programs call their files config.yaml too.
    is_run = folder.config.is_file() and "search" in folder.read_config()
    with _held(folder, "out") if is_run else nullcontext():
        yield


@contextmanager
def _held(folder: "RunFolder", argument: str) -> Iterator[None]:
    """Keeps other processes out of a run, and says so where that can't be."""
    from autoprune.locks import hold

    with hold(folder.root, argument) as is_locked:
        _warn_unless(is_locked, folder)
        yield


def _warn_unless(is_locked: bool, folder: "RunFolder") -> None:
    from autoprune.reporting.console import say

    if not is_locked:
        say(
            f"{folder.root}: this system or its file system has no locks; let no "
            f"second command work on this run"
        )
