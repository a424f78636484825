"""The run folder: every artefact's name, atomic writes, provenance. Nothing
half-written stays behind.
"""

import io
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import yaml

from autoprune.config import Settings
from autoprune.errors import UserError

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "gymnasium",
    "stable-baselines3",
    "onnx",
    "onnxruntime",
)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary neighbour of `path`, then renames it into place.

    Raises:
        UserError: If the disk is full or the folder can't be written; the temporary
            file is removed.
    """
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            None,
            f"can't write {str(path)!r} ({reason}); choose another folder or free some "
            f"space",
        ) from error
    finally:
        if partial.exists():
            partial.unlink()


def write_state(path: Path, state: dict) -> None:
    """Writes a checkpoint that `torch.load(weights_only=True)` reads, atomically."""
    import torch

    # In memory first: on a full disk torch.save itself raises a RuntimeError that names
    # neither file nor reason.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, lambda partial: partial.write_bytes(buffer.getvalue()))


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically; see `write_atomically`."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Writes `value` as indented JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    Attributes:
        root: The folder itself.
    """

    root: Path

    config = property(lambda self: self.root / "config.yaml")
    log = property(lambda self: self.root / "log.jsonl")
    allocation = property(lambda self: self.root / "allocation.json")
    start = property(lambda self: self.root / "start")
    policy = property(lambda self: self.root / "policy")
    sparse = property(lambda self: self.root / "sparse")
    masks = property(lambda self: self.root / "masks.safetensors")
    blocks = property(lambda self: self.root / "blocks.json")
    merged = property(lambda self: self.root / "merged")
    pruned = property(lambda self: self.root / "pruned")
    onnx = property(lambda self: self.root / "model.onnx")
    program = property(lambda self: self.root / "model.pt2")
    report = property(lambda self: self.root / "report.html")
    results = property(lambda self: self.root / "results.json")
    pareto = property(lambda self: self.root / "pareto.json")
    checkpoints = property(lambda self: self.root / "checkpoints")
    finetune_checkpoint = property(lambda self: self.checkpoints / "finetune.pt")
    tensorboard = property(lambda self: self.root / "tensorboard")

    @classmethod
    def open(cls, root: str | Path) -> "RunFolder":
        """An existing run.

        Raises:
            UserError: If `root` is no run folder, or its config can't be read.
        """
        folder = cls(Path(root))
        if not folder.root.is_dir():
            raise UserError(
                "run",
                f"no folder {str(root)!r}; give the folder that `autoprune run` "
                f"printed",
            )
        if not folder.config.is_file():
            raise UserError(
                "run",
                f"{str(root)!r} is not a run folder (no config.yaml); give one "
                f"that `autoprune run` wrote",
            )
        folder.read_config()
        return folder

    def read_config(self) -> dict:
        """The merged config that the run was started with, provenance included."""
        try:
            config = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            reason = type(error).__name__
            raise UserError(
                "run", f"{str(self.config)!r} is damaged ({reason}); start the run anew"
            ) from error
        if not isinstance(config, dict):
            raise UserError(
                "run",
                f"{str(self.config)!r} is damaged (no mapping); start the run anew",
            )
        return config

    def read_json(self, path: Path) -> dict:
        """One of the run's JSON files.

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

    @property
    def known_results(self) -> dict:
        """What is in results.json so far; empty before the first stage is done."""
        return self.read_json(self.results) if self.results.exists() else {}

    def add_results(self, **fields: object) -> dict:
        """Merges fields into results.json and returns all of it."""
        merged = self.known_results | fields
        write_json(self.results, merged)
        return merged

    def forget(self, *names: str) -> None:
        """Takes fields out of results.json, those that are there."""
        known = self.known_results
        if any(name in known for name in names):
            write_json(
                self.results,
                {name: value for name, value in known.items() if name not in names},
            )

    def append(self, event: str, **fields: object) -> None:
        """Adds one line to the log, flushed, so that a killed run keeps it."""
        line = json.dumps({"event": event, **fields}).encode() + b"\n"
        with self.log.open("ab+") as log:
            if log.tell() and not _ends_line(log):
                line = (
                    b"\n" + line
                )  # a kill cut the last line short; it must not swallow this one
            log.write(line)

    def logging(
        self, event: str, on_epoch: Callable[[int, float], None]
    ) -> Callable[[int, float], None]:
        """What to call after each epoch of a training: it is logged as `event`, then
        `on_epoch` is told.
        """

        def finished(epoch: int, loss: float) -> None:
            self.append(event, epoch=epoch, loss=loss)
            on_epoch(epoch, loss)

        return finished

    def events(self, event: str) -> Iterator[dict]:
        """The log's lines of one kind, oldest first; a last line cut short by a kill is
        left out.
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


def start_run(settings: Settings, out: str | None, resume: bool) -> RunFolder:
    """A new run folder with its config, or, to resume, an existing one that was started
    with the same settings.

    Raises:
        UserError: If the folder holds a run already, can't be written, or was started
            with other settings.
    """
    if resume:
        folder = RunFolder.open(out)
        changed = _differences(
            Settings.from_dict(folder.read_config()).to_dict(), settings.to_dict()
        )
        if changed:
            raise UserError(
                "resume",
                f"{out!r} was started with other settings ({changed}); "
                f"repeat its command",
            )
        return folder
    folder = RunFolder(Path(out) if out else _next_folder(settings))
    if folder.config.exists():
        raise UserError(
            "out",
            f"{str(folder.root)!r} holds a run already; resume it, "
            f"or choose another folder",
        )
    write_text(
        folder.config,
        yaml.safe_dump(settings.to_dict() | provenance(), sort_keys=False),
    )
    return folder


def _next_folder(settings: Settings) -> Path:
    search = settings.search
    stem = file_stem(settings.network.model, search.budget, search.agent)
    number = 1
    while (Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return Path("runs") / f"{stem}-{number}"


def file_stem(*parts: str) -> str:
    """Words as the name of a file, joined by dashes: networks and budgets hold signs
    that no name should.
    """
    return re.sub("[:=/]", "-", "-".join(parts)).replace("%", "")


def _differences(old: dict, new: dict) -> str:
    changed = [
        f"{k}: {old[s][k]} -> {new[s][k]}"
        for s in new
        for k in new[s]
        if old[s][k] != new[s][k]
    ]
    return ", ".join(changed)


def provenance() -> dict:
    """Command, versions and hardware, for the config of a run."""
    return {
        "command": " ".join(sys.argv),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "system": platform.platform(),
        },
    }
