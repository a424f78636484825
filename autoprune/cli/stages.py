"""The stages of a run as a table, each with its progress on the terminal.

Part of the composition root: heavy imports happen inside the functions.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from autoprune.config import LatencyConfig, OutputConfig, Settings
from autoprune.errors import ExportError

if TYPE_CHECKING:
    from autoprune.pipeline.context import RunContext
    from autoprune.runs import RunFolder


@dataclass
class Job:
    """A run that is being worked on.

    Attributes:
        dense: Network, images and trace before any training.
        folder: The run.
        output: What is shown and searched beside the run itself.
        failed: Why the network couldn't be exported, or measured in the engine that
            was asked for, if it couldn't; the rest of the run is still worth reporting.
    """

    dense: "RunContext"
    folder: "RunFolder"
    output: OutputConfig = field(default_factory=OutputConfig)
    failed: ExportError | None = None

    @property
    def settings(self) -> Settings:
        """What the run was started with."""
        return self.dense.settings

    @cached_property
    def context(self) -> "RunContext":
        """What all stages after sparse training work on."""
        # A run that was opened from its folder is past its sparse training.
        if self.settings.sparse.method == "none" or self.dense.sparse is not None:
            return self.dense
        return self.dense.after_sparse_training(self.folder.sparse)


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: Its name.
        artefacts: What it may write into the run folder, by what is decided and how;
            "FILE: KEY" for a key of a JSON file.
        is_done: Whether what it writes last is there.
        run: Does it, from where an interrupted attempt left off.
    """

    name: str
    artefacts: tuple[str, ...]
    is_done: Callable[[Job], bool]
    run: Callable[[Job], None]


def run_stages(job: Job, *, until: str | None = None) -> None:
    """Runs the stages that aren't done yet, in order.

    Args:
        job: The run.
        until: Name of the last stage; None for all.
    """
    from autoprune.reporting.console import say
    from autoprune.reporting.verbosity import Verbosity
    from autoprune.reporting.wording import duration_text

    for stage in STAGES:
        # Asked of the folder and never remembered, since the folder is all that a
        # killed run leaves.
        if stage.is_done(job):
            say(f"{stage.name}: done already", Verbosity.VERBOSE)
        else:
            started = time.monotonic()
            stage.run(job)
            took = duration_text(time.monotonic() - started)
            say(f"{stage.name}: done in {took}", Verbosity.VERBOSE)
        if stage.name == until:
            return


def _is_inspected(job: Job) -> bool:
    return job.folder.read_results().remarks is not None


def _inspect(job: Job) -> None:
    """Says how images become inputs, and what looks wrong with the dense network."""
    from autoprune.pipeline.stages import inspect_stage
    from autoprune.reporting.console import say

    inspect_stage(job.dense, job.folder, say)


def _is_profiled(job: Job) -> bool:
    from autoprune.pipeline.latency_budget import budgets_latency

    return not budgets_latency(job.settings) or job.folder.latency_model.exists()


def _profile(job: Job) -> None:
    """Keeps the latency model, which was measured before the run began."""
    from autoprune.pipeline.latency_budget import profile_stage

    profile_stage(job.dense, job.folder)


def _is_trained_sparsely(job: Job) -> bool:
    is_asked = job.settings.sparse.method != "none"
    return not is_asked or job.folder.holds_network(job.folder.sparse)


def _train_sparsely(job: Job) -> None:
    from autoprune.pipeline.stages import sparse_stage
    from autoprune.reporting.console import progress

    settings = job.settings
    # For the bar alone: the stage counts by itself.
    epochs = settings.sparse_training.epochs_for(len(job.dense.splits.train))
    with progress(settings.sparse.method, epochs) as advance:
        sparse_stage(job.dense, job.folder, _show_loss(advance))


def _is_decided(job: Job) -> bool:
    from autoprune.cli.search_stage import missing_baselines
    from autoprune.pipeline.methods.registry import method_of

    method = method_of(job.settings)
    # The file of the decision is written last; without it the search isn't done.
    if not method.is_decided(job.folder):
        return False
    if not method.is_searched(job.settings):
        return True
    # Somebody may go on with a run and ask for further baselines.
    return not missing_baselines(job.settings, job.folder, job.output.baselines)


def _decide(job: Job) -> None:
    """A search decides what goes, or the method by itself."""
    from autoprune.cli.search_stage import search_stage
    from autoprune.costs.budget import parse_budget
    from autoprune.pipeline.methods.registry import method_of
    from autoprune.pipeline.stages import decide_stage, keep_order
    from autoprune.reporting.console import progress

    settings = job.settings
    job.folder.add_results(
        run=str(job.folder.root),
        model=settings.network.model,
        data=settings.data.data,
        seed=settings.search.seed,
        budget=str(parse_budget(settings.search.budget)),
        agent=settings.search.agent,
    )
    # Before anything is decided: allocations count blocks in this order.
    keep_order(job.context, job.folder)
    method = method_of(settings)
    if method.is_searched(settings):
        search_stage(job.context, job.folder, job.output.baselines)
        return
    n_steps = method.n_steps(job.context)
    # A bar would be gone before anybody reads it.
    if not n_steps:
        decide_stage(job.context, job.folder, lambda note: None)
        return
    with progress(settings.search.agent, n_steps) as advance:
        decide_stage(job.context, job.folder, advance)


def _is_pruned(job: Job) -> bool:
    # Not by the plan alone: a kill may have left it beside weights of another network.
    return job.folder.holds_network(job.folder.pruned)


def prune(job: Job) -> None:
    """Prunes, after the training that some ways of removing channels need.

    Args:
        job: A run that has decided what goes.
    """
    from autoprune.pipeline.methods.registry import method_of
    from autoprune.pipeline.stages import prune_stage
    from autoprune.reporting.console import progress, say

    epochs = method_of(job.settings).n_epochs(job.context, job.folder)
    if not epochs:
        prune_stage(job.context, job.folder, say, lambda epoch, loss: None)
        return
    with progress(job.settings.removal.method, epochs) as advance:
        prune_stage(job.context, job.folder, say, _show_loss(advance))


def _is_finetuned(job: Job) -> bool:
    from autoprune.pipeline.pruned_folder import read_plan

    return read_plan(job.folder)["stage"] == "finetuned"


def finetune(job: Job) -> None:
    """Fine-tunes the pruned network.

    Args:
        job: A run that has pruned.
    """
    from autoprune.pipeline.stages import finetune_stage
    from autoprune.reporting.console import progress

    epochs = job.settings.finetune.epochs_for(len(job.context.splits.train))
    if not epochs:
        # The stage is done at once, and nothing was trained that could be told of.
        finetune_stage(job.context, job.folder, lambda epoch, loss: None)
        return
    with progress("fine-tune", epochs) as advance:
        finetune_stage(job.context, job.folder, _show_loss(advance))


def _is_evaluated(job: Job) -> bool:
    # Forgotten whenever `pruned/` gets another network, so that this one is read.
    return job.folder.read_results().accuracy is not None


def _evaluate(job: Job) -> None:
    from autoprune.pipeline.stages import evaluate_stage

    evaluate_stage(job.context, job.folder)


def _is_exported(job: Job) -> bool:
    # The file before what is known of it, so both or the export runs again.
    error = job.folder.read_results().onnx_max_relative_error
    return job.folder.onnx.exists() and error is not None


def _export(job: Job) -> None:
    from autoprune.pipeline.stages import export_stage
    from autoprune.reporting.console import say

    say("export: model.onnx, checked against PyTorch")
    try:
        export_stage(job.context, job.folder)
    except ExportError as error:
        # The run isn't lost: latency is measured in PyTorch, and the report says the
        # rest.
        job.failed = error


def _is_timed(job: Job) -> bool:
    from autoprune.pipeline.remarks import NOT_MEASURED

    results = job.folder.read_results()
    if results.latency is None:
        return False
    # Runs of earlier versions say no setting, and couldn't be asked for one.
    if results.latency_setting is None:
        return job.settings.latency == LatencyConfig()
    asked = dataclasses.asdict(job.settings.latency)
    if not asked["threads"]:
        del asked["threads"]
    # A run that goes on may be asked for another setting.
    for row in results.latency:
        if asked.items() <= row.items():
            return True
    refused = f"{NOT_MEASURED} in {asked['engine']}:"
    return any(remark.startswith(refused) for remark in results.remarks or [])


def _measure_latency(job: Job) -> None:
    from autoprune.pipeline.stages import latency_stage
    from autoprune.reporting.console import say

    say("latency: dense and pruned")
    refusal = latency_stage(job.context, job.folder)
    # Of an export that failed it is known already.
    if refusal is not None and job.failed is None:
        job.failed = ExportError(refusal)


def _show_loss(advance: Callable[[str], None]) -> Callable[[int, float], None]:
    """What a training calls after each epoch to advance a bar."""
    return lambda epoch, loss: advance(f"loss {loss:.4f}")


STAGES: tuple[Stage, ...] = (
    # First: whoever reads that the preprocessing is wrong stops the run here.
    Stage("inspect", ("results.json: remarks",), _is_inspected, _inspect),
    Stage("profile", ("latency_model.json",), _is_profiled, _profile),
    Stage("sparse", ("sparse/",), _is_trained_sparsely, _train_sparsely),
    Stage(
        "decide",
        (
            "policy/",
            "pareto.json",
            "masks.safetensors",
            "blocks.json",
            "allocation.json",
        ),
        _is_decided,
        _decide,
    ),
    # From here on no stage needs a search, nor anything of reinforcement learning.
    Stage("prune", ("merged/", "pruned/"), _is_pruned, prune),
    Stage("finetune", ("pruned/",), _is_finetuned, finetune),
    Stage("evaluate", ("results.json: accuracy",), _is_evaluated, _evaluate),
    Stage("export", ("model.onnx",), _is_exported, _export),
    # After the export, whose file ONNX Runtime is timed with.
    Stage("latency", ("results.json: latency",), _is_timed, _measure_latency),
)
"""What `autoprune run` does, in order.

Every command that adds to a run then writes the report anew, see `finish`.
"""


def finish(job: Job, as_json: bool) -> None:
    """Writes the report and prints the results.

    Every command that adds to a run ends so.

    Args:
        job: The run.
        as_json: Whether the last line of stdout is one JSON object.
    """
    import json

    from autoprune.pipeline.stages import report_stage
    from autoprune.reporting.console import print_results

    print(f"report: {report_stage(job.folder)}")
    results = job.folder.read_results().summary()
    print_results(results)
    print(f"run folder: {job.folder.root}")
    if as_json:
        print(json.dumps(results))
