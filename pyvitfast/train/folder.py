"""The output folder of a run: settings, metrics, model files, checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from pyvitfast.models.checkpoint import load, save, write_atomically
from pyvitfast.train.errors import UserError
from pyvitfast.train.settings import Settings

CONFIG, METRICS, MODEL, DENSE, GROWN, TEACHER, LATENCY, CHECKPOINTS = (
    "config.yaml",
    "metrics.jsonl",
    "model.safetensors",
    "dense.safetensors",
    "grown.safetensors",
    "teacher.safetensors",
    "latency.json",
    "checkpoints",
)
KEEP = 2
# Where a run is done and how fast its loader is do not change its numbers.
_MAY_CHANGE = {"device", "workers", "check_images", "data_dir", "download"}


@dataclass
class Snapshot:
    """A checkpoint: the model, and everything else as tensors and plain data."""

    model: nn.Module
    state: dict[str, Any]
    path: Path


class RunFolder:
    """Reads and writes the output folder; only the main process writes.

    Args:
        path: the folder.
        verb: the command that fills it.
        writes: whether this process writes.
    """

    def __init__(self, path: Path, verb: str, writes: bool = True) -> None:
        self.path, self.verb, self.writes = path, verb, writes
        self._metrics: Any = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / CHECKPOINTS

    def start(self, settings: Settings, overwrite: bool) -> None:
        """Make the folder for a new run.

        Raises:
            UserError: it cannot be written, or holds something already and ``overwrite`` is not given.
        """
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()):
                if not overwrite:
                    raise UserError(
                        f"--out {self.path} is not empty. Go on with its run with --resume, start over in it "
                        "with --overwrite, or name another folder."
                    )
                self._clear()
            self.checkpoints.mkdir()
            document = {"verb": self.verb, **settings.to_dict()}
            write_atomically(self.path / CONFIG, yaml.safe_dump(document, sort_keys=False).encode())
            self._metrics = (self.path / METRICS).open("wb")
        except OSError as error:
            raise UserError(
                f"--out {self.path} cannot be written: {error.strerror or error}. "
                "Name a folder you may write to."
            ) from error

    def _clear(self) -> None:
        """Remove what a run writes, and nothing else."""
        for name in (CONFIG, METRICS, MODEL, DENSE, GROWN, TEACHER, LATENCY):
            (self.path / name).unlink(missing_ok=True)
        for report in self.path.glob("report*"):
            if report.suffix in (".html", ".png"):
                report.unlink()
        if self.checkpoints.is_dir():
            shutil.rmtree(self.checkpoints)

    def saved_settings(self) -> Settings:
        """The settings of the run in this folder.

        Raises:
            UserError: there is no run, or one of another verb.
        """
        path = self.path / CONFIG
        if not path.is_file():
            raise UserError(
                f"--resume: there is no run in {self.path} (no {CONFIG}). "
                "Check --out, or leave --resume out to start."
            )
        try:
            document = yaml.safe_load(path.read_text())
            verb = document.pop("verb")
        except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            raise UserError(f"--resume: {path} is damaged. Start anew in another --out.") from error
        if verb != self.verb:
            raise UserError(
                f"--resume: the run in {self.path} was started by `pyvitfast {verb}`, not {self.verb}."
            )
        return Settings.from_dict(document, str(path))

    def resume(self, flags: Mapping[str, Any]) -> tuple[Settings, Snapshot | None]:
        """Settings and newest whole checkpoint of the run in this folder; metrics are cut back to it.

        Args:
            flags: settings given again; they must not differ, except those that do not change the numbers.

        Raises:
            UserError: no run, other settings, or no checkpoint that can be read.
        """
        saved = self.saved_settings()
        merged = Settings.from_dict({**saved.to_dict(), **flags})
        differing = [
            f"{key} ({saved.to_dict()[key]!r} then, {value!r} now)"
            for key, value in merged.to_dict().items()
            if key not in _MAY_CHANGE and value != saved.to_dict()[key]
        ]
        if differing:
            raise UserError(
                f"--resume: settings differ from those of the run in {self.path}: {', '.join(differing)}. "
                "Leave them out to go on with it, or start anew in another --out."
            )
        snapshot = self._newest()
        try:
            if self.writes:
                self._metrics = (self.path / METRICS).open("ab")
                self._metrics.truncate(snapshot.state["metrics_bytes"] if snapshot else 0)
                self._metrics.seek(0, os.SEEK_END)
        except OSError as error:
            raise UserError(f"--out {self.path} cannot be written: {error.strerror or error}.") from error
        return merged, snapshot

    def _newest(self) -> Snapshot | None:
        folders = sorted((p for p in self.checkpoints.glob("[0-9]*") if p.is_dir()), reverse=True)
        problems = []
        for folder in folders:
            try:
                state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
                return Snapshot(load(folder / MODEL), state, folder)
            except Exception as error:  # bytes that are no pickle make the unpickler raise anything
                problems.append(
                    f"{folder}: {str(error).strip().splitlines()[0] if str(error) else 'damaged'}"
                )
        if problems:
            raise UserError(
                f"--resume: no checkpoint can be read: {'; '.join(problems)}. Start anew in another --out."
            )
        return None

    def log(self, event: str, **values: Any) -> None:
        """Append one JSON object to the metrics and flush it."""
        if self._metrics is not None:
            self._metrics.write(json.dumps({"event": event, **values}).encode() + b"\n")
            self._metrics.flush()

    def events(self) -> list[dict[str, Any]]:
        """All metrics written so far."""
        return [json.loads(line) for line in (self.path / METRICS).read_text().splitlines()]

    def checkpoint(self, model: nn.Module, state: dict[str, Any]) -> Path:
        """Write a checkpoint beside the older ones, then drop all but the last two.

        A kill at any moment leaves at least one whole checkpoint: the new one gets its name only when it is
        on disk.
        """
        assert self._metrics is not None, "only the main process writes checkpoints"
        os.fsync(self._metrics.fileno())
        state = {**state, "metrics_bytes": self._metrics.tell()}
        older = sorted(p for p in self.checkpoints.glob("[0-9]*") if p.is_dir())
        number = int(older[-1].name) + 1 if older else 1
        temporary = self.checkpoints / f".{number:06d}"
        shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
        temporary.mkdir()
        save(model, temporary / MODEL)
        with (temporary / "state.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        target = self.checkpoints / f"{number:06d}"
        temporary.rename(target)
        _sync_folder(self.checkpoints)
        for folder in older[: 1 - KEEP]:
            shutil.rmtree(folder)
        return target

    def save_model(self, model: nn.Module, name: str = MODEL) -> None:
        """Write ``model`` into the folder."""
        if self.writes:
            save(model, self.path / name)

    def close(self) -> None:
        """Close the metrics file."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
