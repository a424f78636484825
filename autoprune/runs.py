"""The run folder: every artefact's name, atomic writes, provenance. Nothing half-written is ever left under a final name."""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml

from autoprune.errors import UserError

PACKAGES = ("torch", "torchvision", "numpy", "gymnasium", "stable-baselines3", "onnx", "onnxruntime")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary neighbour of `path`, then renames it into place.

    Raises:
        UserError: If the disk is full or the folder can't be written; the temporary file is removed.
    """
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--out: can't write {str(path)!r} ({reason}); choose another folder or free some space") from error
    finally:
        if partial.exists():
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically; see `write_atomically`."""
    write_atomically(path, lambda partial: partial.write_text(text))


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
    policy = property(lambda self: self.root / "policy")
    pruned = property(lambda self: self.root / "pruned")
    onnx = property(lambda self: self.root / "model.onnx")
    report = property(lambda self: self.root / "report.html")
    results = property(lambda self: self.root / "results.json")
    checkpoints = property(lambda self: self.root / "checkpoints")
    tensorboard = property(lambda self: self.root / "tensorboard")

    @classmethod
    def open(cls, root: str | Path) -> "RunFolder":
        """An existing run.

        Raises:
            UserError: If `root` is no run folder, or its config can't be read.
        """
        folder = cls(Path(root))
        if not folder.root.is_dir():
            raise UserError(f"RUN: no folder {str(root)!r}; give the folder that `autoprune run` printed")
        if not folder.config.is_file():
            raise UserError(f"RUN: {str(root)!r} is not a run folder (no config.yaml); give one that `autoprune run` wrote")
        folder.read_config()
        return folder

    def read_config(self) -> dict:
        """The merged config that the run was started with, provenance included."""
        try:
            config = yaml.safe_load(self.config.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"RUN: {str(self.config)!r} is damaged ({type(error).__name__}); start the run anew") from error
        if not isinstance(config, dict):
            raise UserError(f"RUN: {str(self.config)!r} is damaged (no mapping); start the run anew")
        return config

    def read_json(self, path: Path) -> dict:
        """One of the run's JSON files.

        Raises:
            UserError: If the run hasn't got that far, or the file is damaged.
        """
        if not path.is_file():
            raise UserError(f"RUN: {str(self.root)!r} has no {path.relative_to(self.root)} yet; finish it with: autoprune run --resume")
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"RUN: {str(path)!r} is damaged ({error}); start the run anew") from error

    def append(self, event: str, **fields: object) -> None:
        """Adds one line to the log, flushed, so that a killed run keeps it."""
        with self.log.open("a") as log:
            log.write(json.dumps({"event": event, **fields}) + "\n")

    def events(self, event: str) -> Iterator[dict]:
        """The log's lines of one kind, oldest first; a last line cut short by a kill is left out."""
        if not self.log.exists():
            return
        for line in self.log.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry["event"] == event:
                yield entry


def provenance() -> dict:
    """Command, versions and hardware, for the config of a run."""
    return {
        "command": " ".join(sys.argv),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "system": platform.platform()},
    }
