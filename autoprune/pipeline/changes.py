"""Which settings of a run may change when it goes on: those of stages yet to come.

Loads no torch, so that a refused command ends at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from autoprune.config import Settings
from autoprune.costs.budget import has_metric, parse_budget
from autoprune.files import PLAN, write_text
from autoprune.runs import RunFolder, other_than_stored


@dataclass(frozen=True)
class Training:
    """One of the trainings that a run may have.

    Attributes:
        is_asked: Whether settings ask for it.
        is_over: Whether a run has done it.
        checkpoints: Its files in the run's folder of checkpoints, as a pattern.
    """

    is_asked: Callable[[Settings], bool]
    is_over: Callable[[RunFolder], bool]
    checkpoints: str

    def is_open(self, folder: RunFolder) -> bool:
        """Whether a run can do it in any way and lose nothing by that.

        It isn't over, and there is no finished epoch of it: it has not begun, or has
        diverged.

        Args:
            folder: The run.
        """
        begun = list(folder.checkpoints.glob(self.checkpoints))
        return not begun and not self.is_over(folder)


def _is_trained_sparsely(folder: RunFolder) -> bool:
    return folder.holds_network(folder.sparse)


def _is_decided(folder: RunFolder) -> bool:
    return folder.allocation.exists()


def _is_removed(folder: RunFolder) -> bool:
    return folder.holds_network(folder.merged)


def _is_finetuned(folder: RunFolder) -> bool:
    if not folder.holds_network(folder.pruned):
        return False
    return folder.read_json(folder.pruned / PLAN)["stage"] == "finetuned"


TRAININGS: dict[str, Training] = {
    "sparse": Training(
        lambda settings: settings.sparse.method != "none",
        _is_trained_sparsely,
        "sparse.pt",
    ),
    # The accuracy model's short trainings; those that are measured stay measured only
    # while their settings stay.
    "dimensions": Training(
        lambda settings: settings.search.agent == "polynomial",
        _is_decided,
        "point-*.pt",
    ),
    "removal": Training(
        lambda settings: settings.removal.method != "slice", _is_removed, "removal.pt"
    ),
    "finetune": Training(lambda settings: True, _is_finetuned, "finetune.pt"),
}
"""By the stage of the settings that says how each goes."""
OF_FINETUNING = ("epochs", "finetune.lr")
"""What fine-tuning has for itself; the rest of its stage holds for all trainings."""


def changes(folder: RunFolder, settings: Settings) -> dict[str, tuple[Any, Any]]:
    """What a run is to go on with otherwise than it was started.

    Args:
        folder: The run.
        settings: As asked for now.

    Returns:
        Argument to its value before and now.

    Raises:
        UserError: If something is to change that the run has made use of already.
    """
    stored = Settings.from_dict(folder.read_config())
    before = stored.arguments
    changed = {}
    for argument, value in settings.arguments.items():
        if before[argument] == value:
            continue
        if not _may_change(folder, stored, argument):
            raise other_than_stored(argument, folder, before[argument], value)
        changed[argument] = before[argument], value
    return changed


def _may_change(folder: RunFolder, stored: Settings, argument: str) -> bool:
    """Whether a run hasn't made use of a setting yet."""
    stage, _, name = argument.rpartition(".")
    if stage == "latency":
        # It decides nothing then but what is measured at the end.
        is_pruned = folder.holds_network(folder.pruned)
        budget = parse_budget(stored.search.budget)
        return is_pruned and not has_metric(budget, "latency")
    if argument in OF_FINETUNING:
        stage = "finetune"
    # What is trained decides what the other stages are about; how it is trained may
    # change.
    if stage not in TRAININGS or name == "method":
        return False
    concerned = [stage]
    if stage == "finetune" and argument not in OF_FINETUNING:
        concerned = list(TRAININGS)
    for key in concerned:
        training = TRAININGS[key]
        if training.is_asked(stored) and not training.is_open(folder):
            return False
    return True


def change_settings(
    folder: RunFolder, settings: Settings, changed: dict[str, tuple[Any, Any]]
) -> None:
    """Writes changed settings into a run's config, and into its log what changed.

    Args:
        folder: The run.
        settings: What it goes on with.
        changed: See `changes`; empty for nothing.
    """
    if not changed:
        return
    # The config last: that the run goes on otherwise is true as soon as it says so.
    folder.append("changed", settings=changed)
    config = folder.read_config() | settings.to_dict()
    write_text(folder.config, yaml.safe_dump(config, sort_keys=False))
