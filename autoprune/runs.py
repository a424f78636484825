"""The run folder: every artefact's name, its results and its log."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import yaml

from autoprune.config import Settings
from autoprune.errors import UserError
from autoprune.files import (
    DIGEST,
    PLAN,
    WEIGHTS,
    digest_of,
    unwritable,
    write_json,
    write_text,
)
from autoprune.locks import claim, hold
from autoprune.provenance import provenance
from autoprune.results import Results


class Artefact:
    """A file or folder of a run, as an attribute that gives its path.

    Args:
        name: Its path within the run folder.
    """

    def __init__(self, name: str):
        self.name = name

    def __get__(self, folder: "RunFolder", owner: type | None = None) -> Path:
        return folder.root / self.name


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    Attributes:
        root: The folder itself.
    """

    root: Path

    config = Artefact("config.yaml")
    log = Artefact("log.jsonl")
    results = Artefact("results.json")
    report = Artefact("report.html")
    # The policy that a search started from, and the one that it ended with.
    start = Artefact("start")
    policy = Artefact("policy")
    # What was decided, by granularity.
    allocation = Artefact("allocation.json")
    pareto = Artefact("pareto.json")
    masks = Artefact("masks.safetensors")
    blocks = Artefact("blocks.json")
    # What the budgeted latency of an allocation is computed with.
    latency_model = Artefact("latency_model.json")
    # Networks, as weights and plan.
    sparse = Artefact("sparse")
    merged = Artefact("merged")
    pruned = Artefact("pruned")
    onnx = Artefact("model.onnx")
    program = Artefact("model.pt2")
    # What a resumed run goes on from.
    checkpoints = Artefact("checkpoints")
    finetune_checkpoint = Artefact("checkpoints/finetune.pt")
    tensorboard = Artefact("tensorboard")

    @classmethod
    def open(cls, root: str | Path, argument: str = "run") -> "RunFolder":
        """An existing run.

        Args:
            root: Its folder.
            argument: The argument that it came by, for messages.

        Raises:
            UserError: If `root` is no run folder, or its config can't be read.
        """
        folder = cls(Path(root))
        if not folder.root.is_dir():
            raise UserError(
                argument,
                f"no folder {str(root)!r}; give the folder that `autoprune run` "
                f"printed",
            )
        if not folder.config.is_file():
            raise UserError(
                argument,
                f"{str(root)!r} is not a run folder (no config.yaml); give one that "
                f"`autoprune run` wrote",
            )
        folder.read_config()
        return folder

    def read_config(self) -> dict[str, Any]:
        """The merged config that the run was started with, provenance included.

        Raises:
            UserError: If the file is damaged.
        """
        try:
            config = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            reason = type(error).__name__
            raise UserError(
                "run",
                f"{str(self.config)!r} is damaged ({reason}); start the run anew",
            ) from error
        if not isinstance(config, dict):
            raise UserError(
                "run",
                f"{str(self.config)!r} is damaged (no mapping); start the run anew",
            )
        return config

    def read_json(self, path: Path) -> dict[str, Any]:
        """One of the run's JSON files.

        Args:
            path: The file, in the run folder.

        Raises:
            UserError: If the run hasn't got that far, or the file is damaged.
        """
        if not path.is_file():
            missing = path.relative_to(self.root)
            raise UserError(
                "run",
                f"{str(self.root)!r} has no {missing} yet; go on with: autoprune "
                f"run --resume --out RUN",
            )
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(
                "run", f"{str(path)!r} is damaged ({error}); start the run anew"
            ) from error

    def holds_network(self, place: Path) -> bool:
        """Whether weights and plan of a network lie in a folder and belong together.

        Args:
            place: The folder, one of the run's.

        Raises:
            UserError: If the plan is damaged.
        """
        plan = place / PLAN
        weights = place / WEIGHTS
        if not plan.exists() or not weights.exists():
            return False
        digest = self.read_json(plan).get(DIGEST)
        # Plans of earlier versions hold none.
        return digest is None or digest == digest_of(weights)

    def read_results(self) -> Results:
        """What results.json holds so far; nothing before the first stage is done.

        Raises:
            UserError: If the file is damaged or of another version.
        """
        if not self.results.exists():
            return Results()
        return Results.from_json(self.read_json(self.results))

    def add_results(self, **fields: Any) -> Results:
        """Writes fields of the results, beside those that are there.

        Args:
            **fields: Fields of `Results`.

        Returns:
            All results so far.
        """
        results = self.read_results().updated(**fields)
        write_json(self.results, results.to_json())
        return results

    def forget(self, *names: str) -> None:
        """Takes fields out of the results, those that are there.

        Args:
            *names: Fields of `Results`.
        """
        known = self.read_results().to_json()
        if known.keys() & set(names):
            self.add_results(**dict.fromkeys(names))

    def append(self, event: str, **fields: Any) -> None:
        """Adds one line to the log, flushed, so that a killed run keeps it.

        Args:
            event: Kind of the line.
            **fields: Plain data.
        """
        line = json.dumps({"event": event, **fields}).encode() + b"\n"
        with self.log.open("ab+") as log:
            # A kill may have cut the last line short; it must not swallow this one.
            if log.tell() and not _ends_line(log):
                line = b"\n" + line
            log.write(line)

    def logging(
        self, event: str, on_epoch: Callable[[int, float], None]
    ) -> Callable[[int, float], None]:
        """A callback for after each epoch of a training, which also logs the epoch.

        Args:
            event: Kind of the log's lines.
            on_epoch: Called next, with the finished epochs and the mean loss.
        """
        last = None
        for entry in self.events(event):
            last = entry["epoch"], entry["loss"]

        def finished(epoch: int, loss: float) -> None:
            # A training that goes on tells of its last epoch once more.
            if (epoch, loss) != last:
                self.append(event, epoch=epoch, loss=loss)
            on_epoch(epoch, loss)

        return finished

    def events(self, event: str) -> Iterator[dict[str, Any]]:
        """The log's lines of one kind, oldest first.

        Args:
            event: The kind.

        Yields:
            Each line's data; one cut short by a kill is left out.
        """
        if not self.log.exists():
            return
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry["event"] == event:
                yield entry


def _ends_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


@contextmanager
def new_run(
    settings: Settings,
    out: str | None,
    options: Mapping[str, Any] = MappingProxyType({}),
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[tuple[RunFolder, bool]]:
    """A new run folder with its config, held until the end of the block.

    Args:
        settings: What the run is started with.
        out: The folder; None for one in runs/ that nobody has.
        options: What else it is started with and decides no result; kept beside the
            settings for a run that goes on.
        facts: What else its config is to hold, such as what was read of the network.

    Yields:
        The run, and whether it is locked; see `autoprune.locks.hold`.

    Raises:
        UserError: If the folder holds a run already, is in use or can't be written.
    """
    root, is_made = _make_folder(settings, out)
    folder = RunFolder(root)
    with hold(root, "out") as is_locked:
        # Under the lock: of two processes that were given one folder the second one
        # finds the first one's config.
        check_free(root)
        config = settings.to_dict() | dict(facts)
        config |= {"options": dict(options)} | provenance()
        try:
            write_text(folder.config, yaml.safe_dump(config, sort_keys=False))
        except UserError:
            # What could hold no config is no run, and goes as it came.
            if is_made:
                shutil.rmtree(root, ignore_errors=True)
            raise
        yield folder, is_locked


def _make_folder(settings: Settings, out: str | None) -> tuple[Path, bool]:
    """The folder of a new run, and whether it was made only now."""
    if out is None:
        search = settings.search
        seed = f"seed{search.seed}"
        stem = file_stem(settings.network.model, search.budget, search.agent, seed)
        stem_path = Path("runs") / stem
    else:
        stem_path = Path(out)
    try:
        if out is None:
            return claim(stem_path), True
        is_made = not stem_path.exists()
        stem_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(stem_path, error) from error
    return stem_path, is_made


def check_free(out: str | Path | None) -> None:
    """Checks that a folder holds no run yet.

    Args:
        out: The folder of a new run; None for one that nobody has.

    Raises:
        UserError: If it does.
    """
    if out is not None and RunFolder(Path(out)).config.exists():
        raise UserError(
            "out",
            f"{str(out)!r} holds a run already; resume it, or choose another folder",
        )


def other_than_stored(
    argument: str, folder: RunFolder, stored: object, given: object
) -> UserError:
    """The error for something that a run to go on with was started with otherwise.

    Args:
        argument: What it is.
        folder: The run.
        stored: What it was started with.
        given: What was asked for.

    Returns:
        The error, to be raised.
    """
    return UserError(
        argument,
        f"{str(folder.root)!r} was started with {_shown(stored)}, got "
        f"{_shown(given)}; leave it out to go on, or start a new run",
    )


def _shown(value: object) -> str:
    """A setting as it is typed."""
    return "null" if value is None else str(value)


def file_stem(*parts: str) -> str:
    """Words as the name of a file, joined by dashes.

    Networks and budgets hold signs that no file's name should; of a network in a file
    the folder is left out.

    Args:
        *parts: The words.
    """
    parts = tuple(re.sub(r"^.*/(?=[^/]*\.py:)", "", part) for part in parts)
    return re.sub("[:=/]", "-", "-".join(parts)).replace("%", "")
