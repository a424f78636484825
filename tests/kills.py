"""Trainings that die after an epoch, for the tests that they go on as if they hadn't."""

from collections.abc import Callable

from autoprune.training.loop import finetune


class KilledError(Exception):
    """What `kill_after` raises."""


def kill_after(
    epoch: int, error: type[BaseException] = KilledError
) -> Callable[[int, float], None]:
    """An `on_epoch` that dies."""

    def kill(finished: int, loss: float) -> None:
        if finished == epoch:
            raise error

    return kill


def interrupted_finetune(*args):
    """`finetune`, called as the stages do, with a Ctrl-C after its second epoch."""
    *before, on_epoch, callback = args

    def die(epoch: int, loss: float) -> None:
        on_epoch(epoch, loss)
        kill_after(2, KeyboardInterrupt)(epoch, loss)

    return finetune(*before, die, callback)
