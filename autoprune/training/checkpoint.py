"""What a training goes on from after a kill: one file, written after each epoch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from autoprune.config import FinetuneConfig
from autoprune.errors import UserError, first_line
from autoprune.files import write_state


class Stateful(Protocol):
    """A method's part in a training, as far as checkpoints hold it."""

    def state_dict(self) -> dict:
        """Returns tensors and numbers from which `load_state_dict` goes on."""
        ...

    def load_state_dict(self, state: dict) -> None:
        """Takes over what `state_dict` returned."""
        ...


@dataclass(frozen=True)
class Progress:
    """What a training changes.

    Attributes:
        model: The network.
        optimizer: With the momentum of its weights.
        schedule: Of the learning rate.
        callback: The method that takes part.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    callback: Stateful


def training_of(config: FinetuneConfig, epochs: int, seed: int) -> dict[str, Any]:
    """What decides how a training goes, as plain data that a checkpoint holds.

    Args:
        config: The training.
        epochs: Its length, which the config may leave open.
        seed: Its seed.
    """
    return dataclasses.asdict(config) | {"epochs": epochs, "seed": seed}


@dataclass(frozen=True)
class Checkpoint:
    """The file that a training goes on from.

    Attributes:
        path: The file; None keeps nothing.
        training: See `training_of`.
    """

    path: Path | None
    training: Mapping[str, Any]

    def save(self, progress: Progress, n_finished: int, loss: float) -> None:
        """Writes all that `restore` needs.

        Args:
            progress: The training.
            n_finished: Its finished epochs.
            loss: Mean loss of the last one.
        """
        if self.path is None:
            return
        state = {
            "epoch_of": (n_finished, self.training["epochs"]),
            "training": dict(self.training),
            "loss": loss,
            "model": progress.model.state_dict(),
            "optimizer": progress.optimizer.state_dict(),
            "step": progress.schedule.last_epoch,
            "callback": progress.callback.state_dict(),
        }
        write_state(self.path, state)

    def restore(self, progress: Progress) -> tuple[int, float | None]:
        """Takes over what is stored, if anything is.

        Args:
            progress: The training, which is changed in place.

        Returns:
            The number of finished epochs, and the mean loss of the last one; None where
            there is none, or an earlier version didn't keep it.

        Raises:
            UserError: If the file is damaged or of another training.
        """
        if self.path is None or not self.path.exists():
            return 0, None
        try:
            state = self._read()
            n_finished, _ = state["epoch_of"]
            stored = state["training"]
            # Another training is no damage: it has an error of its own, below.
            if not self._differences(stored):
                progress.model.load_state_dict(state["model"])
                progress.optimizer.load_state_dict(state["optimizer"])
                # All that the schedule has to know; the rate is with the optimizer.
                progress.schedule.last_epoch = state["step"]
                # Checkpoints of earlier versions call the callback's state "plug".
                key = "plug" if "plug" in state else "callback"
                progress.callback.load_state_dict(state[key])
        except Exception as error:  # torch raises a dozen types for a damaged file
            reason = first_line(error)
            raise UserError(
                "run",
                f"can't use checkpoint {str(self.path)!r} ({reason}); delete it to "
                f"start over",
            ) from error
        self._check_same(stored)
        return n_finished, state.get("loss")

    def _read(self) -> dict[str, Any]:
        """What the file holds."""
        assert self.path is not None, "asked for by those who have a file"
        # Without unpickling objects: a file may come from anywhere.
        state = torch.load(self.path, weights_only=True)
        # Those of earlier versions know no more of their training than its length.
        _, planned = state["epoch_of"]
        return state | {"training": state.get("training", {}) | {"epochs": planned}}

    def remove_other(self) -> None:
        """Removes the file if it is of another training than this, or damaged."""
        if self.path is None or not self.path.exists():
            return
        try:
            is_other = bool(self._differences(self._read()["training"]))
        except Exception:  # torch raises a dozen types for a damaged file
            is_other = True
        if is_other:
            self.remove()

    def remove(self) -> None:
        """Removes the file, if there is one."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _differences(self, stored: Mapping[str, Any]) -> list[str]:
        """What the stored training has otherwise than this one."""
        # Fields that only one version knows tell nothing.
        common = [name for name in self.training if name in stored]
        return [name for name in common if stored[name] != self.training[name]]

    def _check_same(self, stored: Mapping[str, Any]) -> None:
        """Raises a `UserError` if the file is of another training.

        Nothing of that could be used: its learning rates are others.
        """
        names = self._differences(stored)
        if not names:
            return
        kind = "of another length" if "epochs" in names else "with other settings"
        # The length says most, whatever else differs.
        name = "epochs" if "epochs" in names else names[0]
        raise UserError(
            "run",
            f"checkpoint {str(self.path)!r} is of a training {kind} ({name} "
            f"{stored[name]}, asked for {self.training[name]}); ask for "
            f"{stored[name]} again, or delete it to start over",
        )
