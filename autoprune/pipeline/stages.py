"""From an allocation to a finished network: prune, fine-tune, evaluate, export, report.
Knows nothing of RL.

Each stage reads what it needs from the run folder, writes its artefacts there and adds
its numbers to results.json; a stage that is done isn't done again.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from torch import nn

from autoprune.costs.allocation import Allocation
from autoprune.costs.budget import parse_budget
from autoprune.deploy.export import (
    export_onnx,
    export_program,
    load_pruned,
    save_pruned,
)
from autoprune.deploy.latency import measure_latency
from autoprune.errors import UserError
from autoprune.evaluation.evaluate import accuracy
from autoprune.pipeline.context import Workspace
from autoprune.pipeline.methods.registry import removal
from autoprune.reporting.report import write_report
from autoprune.runs import RunFolder, write_json
from autoprune.training.loop import EpochCallback, finetune
from autoprune.training.sparse import SPARSE

Say = Callable[[str], None]


@contextmanager
def timed(folder: RunFolder, stage: str) -> Iterator[None]:
    """Adds the stage's wall time to results.json: over all attempts, but those that
    were refused.
    """
    started, is_refused = time.perf_counter(), False
    try:
        yield
    except UserError:
        is_refused = True
        raise
    finally:
        if not is_refused:
            seconds = folder.known_results.get("seconds", {})
            seconds[stage] = round(
                seconds.get(stage, 0.0) + time.perf_counter() - started, 2
            )
            folder.add_results(
                seconds=seconds, seconds_total=round(sum(seconds.values()), 2)
            )


def use_allocation(
    workspace: Workspace, allocation: Allocation, folder: RunFolder
) -> None:
    """Makes an allocation the run's own: checked against the network, costed, written.

    Raises:
        UserError: If it is for another network.
    """
    allocation.check(workspace.groups)
    # The allocation comes last: its file says that the search is done, and a resumed
    # run looks no further.
    folder.add_results(**workspace.costs_of(allocation.kept))
    write_json(folder.allocation, allocation.to_json())


def sparse_stage(
    workspace: Workspace, folder: RunFolder, on_epoch: EpochCallback
) -> Workspace:
    """Trains sparsely where the settings ask for it; returns the workspace whose
    network is to be pruned.

    Resumes after the last finished epoch; `sparse/` holds the result.
    """
    sparse = workspace.settings.sparse
    if sparse.method == "none":
        return workspace
    if not (folder.sparse / "plan.json").exists():
        with timed(folder, "sparse"):
            _train_sparsely(workspace, folder, on_epoch)
    return workspace.after_sparse_training(folder.sparse)


def _train_sparsely(
    workspace: Workspace, folder: RunFolder, on_epoch: EpochCallback
) -> None:
    settings, sparse, train = (
        workspace.settings,
        workspace.settings.sparse,
        workspace.splits.train,
    )
    method = SPARSE[sparse.method]
    strength = method.strength if sparse.strength is None else sparse.strength
    config = settings.sparse_training
    model, callback = (
        copy.deepcopy(workspace.dense),
        method.callback(workspace.widths, strength, _share(workspace)),
    )
    checkpoint, seed = folder.checkpoints / "sparse.pt", settings.search.seed
    log = folder.logging("sparse epoch", on_epoch)
    finetune(model, train, config, seed, workspace.dense, checkpoint, log, callback)
    epochs = config.epochs_for(len(train))
    folder.add_results(
        sparse_method=sparse.method, sparse_strength=strength, sparse_epochs=epochs
    )
    save_pruned(
        model, folder.sparse, workspace.network | {"stage": "sparse", "epochs": epochs}
    )


def _share(workspace: Workspace) -> float:
    """The share that sparse training works with: given, or the method's, or the
    budget's.
    """
    settings, costs = workspace.settings, workspace.costs
    for share in (settings.sparse.share, SPARSE[settings.sparse.method].share):
        if share is not None:
            return share
    return parse_budget(settings.search.budget).at(0).share_of(costs)


def keep_order(workspace: Workspace, folder: RunFolder) -> None:
    """Writes down in which order blocks go, where depth is decided: measured again, a
    tie might break otherwise.
    """
    if workspace.scaling and not folder.blocks.exists():
        write_json(folder.blocks, {"order": workspace.scaling.order})


def decide_stage(workspace: Workspace, folder: RunFolder, advance: Say) -> None:
    """Decides what goes where no search does; `advance` is told of each long step."""
    with timed(folder, "search"):
        decided = removal(workspace, folder)
        decision, found = decided.decide(advance)
    seconds = folder.known_results["seconds"]["search"]
    folder.add_results(
        **decided.costs(decision),
        **found,
        episodes=0,
        evaluations=0,
        seconds_search=seconds,
    )
    # The decision comes last: its file says that the search is done, and a resumed run
    # looks no further.
    decided.keep(decision)


def prune_stage(
    workspace: Workspace, folder: RunFolder, say: Say, on_epoch: EpochCallback
) -> None:
    """Applies what was decided; `pruned/` then holds the network, recalibrated but not
    fine-tuned.
    """
    with timed(folder, "prune"):
        decided = removal(workspace, folder)
        decided.prepare(on_epoch)
        pruned = decided.network()
        plan = workspace.network | {"stage": "pruned"} | decided.plan()
        _replace(folder, pruned, plan, "accuracy_pruned", "finetune_epochs")
        before, after = (
            sum(int(p.count_nonzero()) for p in m.parameters())
            for m in (workspace.model, pruned)
        )
        say(f"pruned: {before:,} -> {after:,} non-zero parameters")


def _replace(folder: RunFolder, model: nn.Module, plan: dict, *forgotten: str) -> None:
    """Writes another network into `pruned/`, after what was measured of, or exported
    from, the one before is gone.
    """
    folder.forget(
        "accuracy",
        "latency",
        "latency_ms",
        "latency_ms_dense",
        "onnx_max_relative_error",
        *forgotten,
    )
    for exported in (folder.onnx, folder.program):
        exported.unlink(missing_ok=True)
    save_pruned(model, folder.pruned, plan)


def read_plan(folder: RunFolder) -> dict:
    """The plan beside the pruned weights; its "stage" is "pruned" or "finetuned"."""
    return folder.read_json(folder.pruned / "plan.json")


def finetune_stage(
    workspace: Workspace, folder: RunFolder, on_epoch: EpochCallback
) -> None:
    """Fine-tunes the pruned network, resuming after the last finished epoch; `pruned/`
    then holds the result.
    """
    config, plan = workspace.settings.finetune, read_plan(folder)
    epochs = config.epochs_for(len(workspace.splits.train))
    with timed(folder, "finetune"):
        # Always from the pruned network, whatever is stored: a second call with other
        # settings must not train on top.
        decided = removal(workspace, folder)
        model = decided.network()
        log = folder.logging("epoch", on_epoch)
        seed, train = workspace.settings.search.seed, workspace.splits.train
        finetune(
            model,
            train,
            config,
            seed,
            workspace.dense,
            folder.finetune_checkpoint,
            log,
            decided.callback(),
        )
        folder.add_results(finetune_epochs=epochs)
        _replace(folder, model, plan | {"stage": "finetuned", "epochs": epochs})


def evaluate_stage(workspace: Workspace, folder: RunFolder) -> dict:
    """Reads the test split, once: accuracy of the dense, the pruned and the fine-tuned
    network.

    That of the dense network isn't measured again where the run knows it.
    """
    with timed(folder, "evaluate"):
        plan, test, known = (
            read_plan(folder),
            workspace.splits.test,
            folder.known_results,
        )
        pruned = removal(workspace, folder).network()
        scores = {
            "accuracy_dense": known["accuracy_dense"]
            if "accuracy_dense" in known
            else accuracy(workspace.dense, test),
            "accuracy_pruned": accuracy(pruned, test),
            "test_images": len(test),
        }
        if plan["stage"] == "finetuned":
            scores["accuracy"] = accuracy(load_pruned(folder.pruned), test)
    return folder.add_results(**scores)


def export_stage(workspace: Workspace, folder: RunFolder, format: str = "onnx") -> Path:
    """Writes the network for use elsewhere: `model.onnx`, checked against PyTorch, or
    `model.pt2` (torch.export).

    Raises:
        UserError: If the format is unknown.
        ExportError: If the network can't be written so.
    """
    if format not in ("onnx", "torch"):
        raise UserError("format", f"must be onnx or torch, got {format!r}")
    with timed(folder, "export"):
        model = load_pruned(folder.pruned)
        if format == "torch":
            return export_program(model, workspace.splits.example, folder.program)
        error = export_onnx(model, workspace.splits.example, folder.onnx)
    folder.add_results(onnx_max_relative_error=error)
    return folder.onnx


def latency_stage(workspace: Workspace, folder: RunFolder, batch: int) -> None:
    """Measures dense and pruned in torch and, where there is a file, ONNX Runtime,
    batch 1 and `batch`, alternating.
    """
    with timed(folder, "latency"):
        pruned, onnx = (
            load_pruned(folder.pruned),
            folder.onnx if folder.onnx.exists() else None,
        )
        sizes = sorted({1, batch})
        rows = measure_latency(
            workspace.dense, pruned, workspace.splits.example, onnx, sizes
        )
    first = next((row for row in rows if row.engine == "onnxruntime"), rows[0])
    latency = {"latency_ms": first.pruned_ms, "latency_ms_dense": first.dense_ms}
    folder.add_results(latency=[asdict(row) for row in rows], **latency)


def report_stage(folder: RunFolder) -> Path:
    """Writes `report.html` from what the folder holds."""
    return write_report(folder)


def summary(folder: RunFolder) -> dict:
    """The results for `--json`: what was measured, without the long tables."""
    results = folder.read_json(folder.results)
    return {key: value for key, value in results.items() if not isinstance(value, list)}
