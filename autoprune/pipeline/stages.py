"""The stages of a run around the search, on its folder. Knows nothing of RL.

Each stage reads what it needs from the run folder, writes its artefacts there and adds
its numbers to results.json. What a stage writes last says that it is done;
`autoprune.cli.stages` asks for that and calls no stage twice.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from autoprune.costs.allocation import Allocation
from autoprune.costs.budget import parse_budget
from autoprune.deploy.export import export_onnx, export_program
from autoprune.deploy.pruned import load_pruned, save_pruned
from autoprune.errors import ExportError, UserError
from autoprune.evaluation.evaluate import accuracy
from autoprune.files import write_json
from autoprune.latency.engines import setting_of
from autoprune.latency.measuring import Latency, measure_latency, reported_settings
from autoprune.latency.samples import takes_batches
from autoprune.pipeline.budgeted import allocation_reached
from autoprune.pipeline.context import RunContext
from autoprune.pipeline.diverging import explained
from autoprune.pipeline.methods.registry import method_of
from autoprune.pipeline.pruned_folder import (
    read_plan,
    replace_pruned,
    replace_remarks,
)
from autoprune.pipeline.remarks import (
    LOST_ACCURACY,
    NOT_FASTER,
    NOT_MEASURED,
    dense_remarks,
    finetune_remarks,
    refusal_remark,
    speed_remarks,
)
from autoprune.reporting.report import write_report
from autoprune.results import Results
from autoprune.runs import RunFolder
from autoprune.training.checkpoint import Checkpoint, training_of
from autoprune.training.loop import EpochCallback, finetune
from autoprune.training.sparse import SPARSE

Say = Callable[[str], None]


@contextmanager
def timed(folder: RunFolder, stage: str) -> Iterator[None]:
    """Adds a stage's wall time to the results, over all attempts.

    Attempts that a `UserError` refused don't count.

    Args:
        folder: The run.
        stage: Its name in the results.
    """
    started = time.perf_counter()
    is_refused = False
    try:
        yield
    # Nothing was done then: the option is mended and the stage starts again.
    except UserError:
        is_refused = True
        raise
    # In `finally`, so that time before Ctrl-C counts: a resumed stage goes on from the
    # work that it bought.
    finally:
        if not is_refused:
            # Read only now, since the stage has written results of its own meanwhile.
            seconds = dict(folder.read_results().seconds or {})
            passed = seconds.get(stage, 0.0) + time.perf_counter() - started
            seconds[stage] = round(passed, 2)
            total = round(sum(seconds.values()), 2)
            folder.add_results(seconds=seconds, seconds_total=total)


def use_allocation(
    context: RunContext, allocation: Allocation, folder: RunFolder
) -> None:
    """Makes an allocation the run's own: checked against the network, costed, written.

    Args:
        context: Network and trace.
        allocation: Group to kept channels.
        folder: The run.

    Raises:
        UserError: If it is for another network.
    """
    # It may come from a file, made by hand or for another network.
    allocation.check(context.groups)
    # The allocation comes last: its file says that the search is done, and a resumed
    # run looks no further.
    reached = allocation_reached(allocation.budget, context.costs, allocation.kept)
    folder.add_results(**context.costs_of(allocation.kept), budgets=reached)
    write_json(folder.allocation, allocation.to_json())


def inspect_stage(context: RunContext, folder: RunFolder, say: Say) -> None:
    """Looks at images and dense network before anything is done with them.

    Args:
        context: The dense network and the images.
        folder: The run.
        say: Told how images become inputs, and of everything that looks wrong.
    """
    splits = context.splits
    with timed(folder, "inspect"):
        say(f"preprocessing: {splits.preprocessing.describe()}")
        remarks = [*context.remarks, *dense_remarks(context.dense, splits)]
        for remark in remarks:
            say(f"warning: {remark}")
        folder.add_results(
            preprocessing=splits.preprocessing.to_dict(), remarks=remarks
        )


def sparse_stage(
    context: RunContext, folder: RunFolder, on_epoch: EpochCallback
) -> None:
    """Trains the network sparsely; `sparse/` holds the result.

    Resumes after the last finished epoch.

    Args:
        context: The dense network, images and trace.
        folder: The run.
        on_epoch: Called after each epoch.
    """
    settings = context.settings
    method = SPARSE[settings.sparse.method]
    strength = settings.sparse.strength
    if strength is None:
        strength = method.strength
    config = settings.sparse_training
    epochs = config.epochs_for(len(context.splits.train))
    with timed(folder, "sparse"):
        # A copy, since the dense network teaches, and is what accuracy is compared
        # with.
        model = copy.deepcopy(context.dense)
        # Inside of the timing, as it may need the trace.
        share = _sparse_share(context)
        with explained(folder, "sparse", "sparse.strength"):
            finetune(
                model,
                context.splits.train,
                config,
                settings.search.seed,
                context.dense,
                folder.checkpoints / "sparse.pt",
                folder.logging("sparse epoch", on_epoch),
                method.callback(context.channel_groups, strength, share),
            )
        folder.add_results(
            sparse_method=settings.sparse.method,
            sparse_strength=strength,
            sparse_epochs=epochs,
        )
        # The network comes last: its plan says that the training is done. A kill before
        # that resumes at the last checkpoint.
        plan = context.network_plan | {"stage": "sparse", "epochs": epochs}
        save_pruned(model, folder.sparse, plan)


def _sparse_share(context: RunContext) -> float:
    """The share of sparse training: as given, the method's, or the budget's."""
    sparse = context.settings.sparse
    if sparse.share is not None:
        return sparse.share
    usual = SPARSE[sparse.method].share
    if usual is not None:
        return usual
    # Of a range the tightest end, where most has to be dispensable.
    budget = parse_budget(context.settings.search.budget).at_position(0)
    return budget.share_of(context.costs)


def keep_order(context: RunContext, folder: RunFolder) -> None:
    """Writes down in which order blocks go, where depth is decided.

    Measured again, a tie might break otherwise.

    Args:
        context: Network and images.
        folder: The run.
    """
    if context.scaling and not folder.blocks.exists():
        write_json(folder.blocks, {"order": context.scaling.order})


def decide_stage(context: RunContext, folder: RunFolder, advance: Say) -> None:
    """Decides what goes where no search does.

    Args:
        context: Network, images and trace.
        folder: The run.
        advance: Told of each long step.
    """
    method = method_of(context.settings)
    with timed(folder, "search"):
        decision, found = method.decide(context, folder, advance)
    # Those of all attempts, which `timed` has just added up.
    seconds = folder.read_results().seconds or {}
    folder.add_results(
        **decision.costs(context),
        **found,
        episodes=0,
        evaluations=0,
        seconds_search=seconds["search"],
    )
    # The decision comes last: its file says that the search is done, and a resumed run
    # looks no further.
    decision.save(folder)


def prune_stage(
    context: RunContext, folder: RunFolder, say: Say, on_epoch: EpochCallback
) -> None:
    """Applies what was decided.

    `pruned/` then holds the network, recalibrated but not fine-tuned.

    Args:
        context: Network, images and trace.
        folder: The run.
        say: Told the number of parameters.
        on_epoch: Called after each epoch, where units leave by training.
    """
    method = method_of(context.settings)
    with timed(folder, "prune"):
        # Before the decision is loaded, since a training may change it: ResRep settles
        # only now how much each group keeps.
        method.train(context, folder, on_epoch)
        decision = method.load(context, folder)
        pruned = method.build(context, decision)
        plan = context.network_plan | {"stage": "pruned"} | decision.plan(context)
        # `finetune RUN` may have left the checkpoint of a training with other settings
        # than the run's, which would be in the way of fine-tuning.
        tuning = context.settings.finetune
        epochs = tuning.epochs_for(len(context.splits.train))
        training = training_of(tuning, epochs, context.settings.search.seed)
        Checkpoint(folder.finetune_checkpoint, training).remove_other()
        # Fine-tuning starts over from another network, so its numbers go as well.
        replace_pruned(folder, pruned, plan, "accuracy_pruned")
        # Without zeros, since masks make no tensor smaller.
        before = _count_nonzero(context.model)
        after = _count_nonzero(pruned)
        say(f"pruned: {before:,} -> {after:,} non-zero parameters")


def _count_nonzero(model: nn.Module) -> int:
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


def finetune_stage(
    context: RunContext, folder: RunFolder, on_epoch: EpochCallback
) -> None:
    """Fine-tunes the pruned network; `pruned/` then holds the result.

    Resumes after the last finished epoch.

    Args:
        context: Network, images and trace.
        folder: The run.
        on_epoch: Called after each epoch.
    """
    settings = context.settings
    # First, since it refuses a run in which nothing is pruned yet.
    plan = read_plan(folder)
    train = context.splits.train
    epochs = settings.finetune.epochs_for(len(train))
    method = method_of(settings)
    with timed(folder, "finetune"):
        # Always from the pruned network, whatever is stored: a second call with other
        # settings must not train on top.
        decision = method.load(context, folder)
        model = method.build(context, decision)
        # A run whose fine-tuning is over goes on with nothing; it is tuned anew.
        is_over = plan["stage"] == "finetuned"
        command = "finetune" if is_over else None
        with explained(folder, "finetune", command=command):
            finetune(
                model,
                train,
                settings.finetune,
                settings.search.seed,
                context.dense,
                folder.finetune_checkpoint,
                folder.logging("epoch", on_epoch),
                method.callback(decision),
            )
        # Its plan then says that fine-tuning is done.
        finetuned = plan | {"stage": "finetuned", "epochs": epochs}
        replace_pruned(folder, model, finetuned)
        # What the plan says, for readers of the results. After a kill before this the
        # evaluation writes it.
        folder.add_results(finetune_epochs=epochs)


def evaluate_stage(context: RunContext, folder: RunFolder) -> Results:
    """Reads the test split, once: accuracy of dense, pruned and fine-tuned network.

    That of the dense network isn't measured again where the run knows it.

    Args:
        context: Network, images and trace.
        folder: The run.

    Returns:
        All results so far.
    """
    method = method_of(context.settings)
    test = context.splits.test
    with timed(folder, "evaluate"):
        plan = read_plan(folder)
        # Built anew, since `pruned/` may hold the fine-tuned network by now.
        pruned = method.build(context, method.load(context, folder))
        accuracy_dense = folder.read_results().accuracy_dense
        if accuracy_dense is None:
            accuracy_dense = accuracy(context.dense, test)
        scores = {
            "accuracy_dense": accuracy_dense,
            "accuracy_pruned": accuracy(pruned, test),
            "test_images": len(test),
        }
        if plan["stage"] == "finetuned":
            scores["accuracy"] = accuracy(load_pruned(folder.pruned), test)
            scores["finetune_epochs"] = plan["epochs"]
    remarks = []
    if "accuracy" in scores:
        before = scores["accuracy_pruned"]
        remarks = finetune_remarks(before, scores["accuracy"], len(test))
    replace_remarks(folder, (LOST_ACCURACY,), remarks)
    # All in one write: after a kill there is either no accuracy, and the stage runs
    # again, or every one.
    return folder.add_results(**scores)


def export_stage(context: RunContext, folder: RunFolder, format: str = "onnx") -> Path:
    """Writes the network for use elsewhere.

    Args:
        context: An example of the images.
        folder: The run.
        format: "onnx" for `model.onnx`, checked against PyTorch, or "torch" for
            `model.pt2`, a torch.export program.

    Returns:
        The file.

    Raises:
        UserError: If the format is unknown.
        ExportError: If the network can't be written so.
    """
    if format not in ("onnx", "torch"):
        raise UserError("format", f"must be onnx or torch, got {format!r}")
    example = context.splits.example
    with timed(folder, "export"):
        # From the folder and not from memory: what is exported is what the run keeps.
        model = load_pruned(folder.pruned)
        if format == "torch":
            return export_program(model, example, folder.program)
        splits = context.splits
        metadata = splits.preprocessing.metadata(splits.classes)
        error = export_onnx(model, example, folder.onnx, metadata)
    folder.add_results(onnx_max_relative_error=error)
    return folder.onnx


def latency_stage(context: RunContext, folder: RunFolder) -> str | None:
    """Measures the latency of dense and pruned network, in turns.

    In the setting that was asked for, and in those that it may be compared with; an
    engine that can't run the network is remarked on.

    Args:
        context: The dense network, an example of the images and the setting.
        folder: The run.

    Returns:
        That and why the engine that was asked for can't run the network, if it can't.
    """
    asked = setting_of(context.settings.latency)
    example = context.splits.example
    rows: list[Latency] = []
    refusals: dict[tuple[str, str], str] = {}
    with timed(folder, "latency"):
        pruned = load_pruned(folder.pruned)
        for setting in reported_settings(asked, takes_batches(pruned, example)):
            place = setting.engine, setting.precision
            # What can't be expressed once can't be at another batch.
            if place in refusals:
                continue
            try:
                rows += measure_latency(context.dense, pruned, example, [setting])
            except (ExportError, UserError) as error:
                refusals[place] = refusal_remark(setting.engine, error)
    fields: dict[str, Any] = {"latency": [row.to_json() for row in rows]}
    # Of an engine that can't run the network there is no row, and another one counts.
    shown = [row for row in rows if row.setting == asked] or rows
    if shown:
        fields["latency_setting"] = asdict(shown[0].setting)
        fields["latency_ms"] = shown[0].pruned_ms
        fields["latency_ms_dense"] = shown[0].dense_ms
    folder.add_results(**fields)
    of_speed = (NOT_FASTER, NOT_MEASURED)
    replace_remarks(folder, of_speed, [*speed_remarks(rows), *refusals.values()])
    return refusals.get((asked.engine, asked.precision))


def report_stage(folder: RunFolder) -> Path:
    """Writes `report.html` from what the folder holds.

    Args:
        folder: The run.
    """
    return write_report(folder)
