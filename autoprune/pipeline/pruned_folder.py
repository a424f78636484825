"""The folder `pruned/` of a run, and what has to go when it gets another network."""

from typing import Any

from torch import nn

from autoprune.deploy.pruned import save_pruned
from autoprune.files import PLAN
from autoprune.pipeline.remarks import LOST_ACCURACY, NOT_FASTER, NOT_MEASURED
from autoprune.runs import RunFolder

MEASURED = (
    "accuracy",
    "finetune_epochs",
    "latency",
    "latency_setting",
    "latency_ms",
    "latency_ms_dense",
    "onnx_max_relative_error",
)
"""Fields of the results that say something of the network in `pruned/`."""


def replace_pruned(
    folder: RunFolder, model: nn.Module, plan: dict[str, Any], *forgotten: str
) -> None:
    """Writes another network into `pruned/`.

    What was measured of, or exported from, the one before goes first.

    Args:
        folder: The run.
        model: The network.
        plan: As for `autoprune.deploy.export.save_pruned`.
        *forgotten: Fields of the results that go beside `MEASURED`.
    """
    # In this order a kill leaves a run that measures or exports once more than it had
    # to, but never numbers or files of another network. Between weights and plan it
    # leaves weights that the plan's digest isn't of, and the run prunes again.
    folder.forget(*MEASURED, *forgotten)
    # Its times are forgotten too.
    replace_remarks(folder, (LOST_ACCURACY, NOT_FASTER, NOT_MEASURED), [])
    for exported in (folder.onnx, folder.program):
        exported.unlink(missing_ok=True)
    save_pruned(model, folder.pruned, plan)


def replace_remarks(
    folder: RunFolder, beginnings: tuple[str, ...], remarks: list[str]
) -> None:
    """Puts remarks on the pruned network in the place of earlier ones of their kinds.

    Args:
        folder: The run.
        beginnings: How the remarks of these kinds begin.
        remarks: See `autoprune.pipeline.remarks`.
    """
    known = folder.read_results().remarks or []
    others = [remark for remark in known if not remark.startswith(beginnings)]
    # Without remarks a run hasn't looked at its images yet, and has to be left so.
    if known or remarks:
        folder.add_results(remarks=[*others, *remarks])


def read_plan(folder: RunFolder) -> dict[str, Any]:
    """The plan beside the pruned weights; its "stage" is "pruned" or "finetuned".

    Args:
        folder: The run.

    Raises:
        UserError: If nothing is pruned yet.
    """
    return folder.read_json(folder.pruned / PLAN)
