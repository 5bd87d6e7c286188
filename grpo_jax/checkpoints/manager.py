"""Checkpoints hold all that a run needs to continue bit for bit after a kill. No other file imports orbax.

    <directory>/<step>/state        the train state, one array per leaf, named by its path ("params/h/0/w")
    <directory>/<step>/extra        JSON of the caller, and the dtype, shape and CRC-32 of every leaf
    <directory>/<step>/<other>      any of OTHER_ITEMS that the caller had at that step, stored like the state
    <directory>/reference/0/state   the frozen reference parameters, written once
    <directory>/corrupted/<step>    a checkpoint that failed its checksums, moved out of the way

A save is written to a temporary directory and renamed when complete, so a process killed at any time
leaves the previous checkpoint whole. Orbax keeps no checksums of what it stores, so our own (`format`) are
verified on every restore. One process writes. Arrays sharded over its devices are gathered on the host.
"""

import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from grpo_jax.checkpoints.format import (
    Descriptions,
    PyTree,
    Template,
    check_fits,
    describe,
    fill_template,
    seal,
    to_device,
    to_host,
    unseal,
)
from grpo_jax.error_text import one_line

# What may be saved beside the state. The list is fixed, because orbax is told of every item when a directory
# is opened.
OTHER_ITEMS = (
    "experience",  # the rollout in use, if the step falls between two passes over it
    "leftovers",  # rows of a rollout that wait for a later step, as many as there are
    "reference",  # the reference parameters, if they move during the run (`save_reference` saves frozen ones)
)


class CorruptedCheckpoint(ValueError):
    """What is on disk is not what was saved."""

    def __init__(self, path: Path, cause: Exception | str):
        super().__init__(f"corrupted checkpoint: {path}: {one_line(cause)}")


class Checkpoints:
    """The checkpoints of one run, saved in the background.

    Args:
        directory: directory of the checkpoints. It is made absolute, and is created if missing.
        keep: number of newest checkpoints kept, at least 1.
        read_only: whether to look at a directory that another process may be writing to, as it is now.
            Nothing is then created, cleaned up or moved. (A second writer would delete the first one's
            unfinished save.)

    Raises:
        ValueError: the directory cannot be written (or, read only, does not exist), or keep is below 1.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2, read_only: bool = False):
        if keep < 1:
            raise ValueError(f"checkpoints: keep is {keep}; keep at least 1")
        self.directory = Path(directory).expanduser().absolute()  # orbax refuses relative paths
        self._read_only = read_only
        _check_directory(self.directory, read_only)
        logging.getLogger("absl").addFilter(_WITHOUT_ORBAX)  # adding it again does nothing
        self._clean_up("trash", "*.orbax-checkpoint-tmp*")
        self._manager = _make_manager(self.directory, keep, read_only)
        self._saving: int | None = None  # the step being written in the background
        self._reference: Checkpoints | None = None

    def save(
        self, step: int, state: PyTree, extra: dict[str, Any], others: Mapping[str, PyTree] | None = None
    ) -> None:
        """Copies everything to the host, starts writing it and returns.

        The caller may donate or overwrite `state` and `others` as soon as this returns.

        Args:
            step: number of optimizer steps done, above every saved step.
            state: pytree of arrays. A Python scalar is stored as the array `jit` would make of it.
            extra: JSON object. What comes back equals what went in.
            others: pytrees of arrays to store beside the state, under names from `OTHER_ITEMS`. Empty
                arrays cannot be stored, so leave out an item that has no rows.

        Raises:
            ValueError: the step is not new, an item has another name, or a leaf or `extra` cannot be stored
                faithfully.
            RuntimeError: the previous save failed in the background, or this one could not start.
        """
        if self._read_only:
            raise ValueError(f"checkpoints {self.directory} were opened read only; nothing can be saved")
        latest = self.latest_step()  # waits for the previous save, and raises its error
        if latest is not None and step <= latest:
            raise ValueError(f"checkpoint step {step} is not after step {latest}, saved in {self.directory}")
        trees = {"state": state, **_check_names(others)}
        items = {item: to_host(tree, item) for item, tree in trees.items()}
        document = seal(extra, items)
        self._saving = step
        args = {name: ocp.args.PyTreeSave(leaves) for name, leaves in items.items()}
        try:
            self._manager.save(
                step, args=ocp.args.Composite(extra=ocp.args.JsonSave(document), **args), force=True
            )
        except Exception as error:
            self._fail(error)

    def restore(
        self,
        step: int,
        state_template: PyTree,
        other_templates: Mapping[str, Template] | None = None,
    ) -> tuple[PyTree, dict[str, Any], dict[str, PyTree]]:
        """Reads one checkpoint and verifies its checksums.

        Args:
            step: one of `steps()`.
            state_template: pytree of arrays or `jax.ShapeDtypeStruct`. It gives structure, shapes and dtypes.
            other_templates: the same for the items of `OTHER_ITEMS` that are wanted. If only the checkpoint
                knows the number of rows, give a function `num_rows -> template`. It is called with the
                length of axis 0 of the item's first leaf if the item was stored.

        Returns:
            `(state, extra, others)`, bit-identical to what was saved. Arrays are uncommitted on the default
            device, and weakly typed where the template is. `others` holds the items that were stored and
            have a template.

        Raises:
            CorruptedCheckpoint: a file is missing, unreadable or fails its checksum.
            ValueError: there is no such step, a template has another name, or the checkpoint does not fit
                the templates.
        """
        wanted = _check_names(other_templates)
        extra, saved = self._document(step)
        others = {item: fill_template(t, saved[item], item) for item, t in wanted.items() if item in saved}
        templates = {"state": state_template, **others}
        for item, template in templates.items():
            check_fits(saved[item], template, self.directory / str(step) / item)
        restored = {item: self._restore_item(step, item, saved[item], t) for item, t in templates.items()}
        return restored.pop("state"), extra, restored

    def restore_latest(
        self,
        state_template: PyTree,
        other_templates: Mapping[str, Template] | None = None,
    ) -> tuple[int, PyTree, dict[str, Any], dict[str, PyTree]]:
        """Restores the newest checkpoint that is whole.

        It warns about corrupted newer ones and moves them to `corrupted/`, so that their steps can be
        saved again.

        Returns:
            `(step, state, extra, others)`. Templates and the other values are those of `restore`.

        Raises:
            CorruptedCheckpoint: every checkpoint is corrupted.
            ValueError: there is no checkpoint, a template has another name, or the newest whole checkpoint
                does not fit the templates.
        """
        corrupted: dict[int, CorruptedCheckpoint] = {}
        for step in reversed(self.steps()):
            try:
                restored = self.restore(step, state_template, other_templates)
            except CorruptedCheckpoint as error:
                corrupted[step] = error
                continue
            for bad, reason in corrupted.items():
                warnings.warn(f"{reason}; going back to the checkpoint of step {step}", stacklevel=2)
                self._set_aside(bad)
            return step, *restored
        if not corrupted:
            raise ValueError(f"no checkpoint in {self.directory}")
        causes = "; ".join(map(str, corrupted.values()))
        raise CorruptedCheckpoint(self.directory, f"no step is whole: {causes}")

    def extra(self, step: int) -> dict[str, Any]:
        """Reads only the JSON that was saved with a step. Raises as `restore` does."""
        return self._document(step)[0]

    def steps(self) -> list[int]:
        """Returns the saved steps, oldest first, after waiting for a save under way."""
        self.wait()
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Returns the newest saved step, or None without any, after waiting for a save under way."""
        return max(self.steps(), default=None)

    def save_reference(self, params: PyTree) -> None:
        """Writes the reference parameters, once, and waits until they are on disk.

        Raises:
            ValueError: there is a reference already. It must never change during a run.
            RuntimeError: it could not be written.
        """
        if self.has_reference():
            raise ValueError(f"{self.directory / 'reference'} exists; the reference is saved once")
        reference = self._open_reference()
        reference.save(0, params, {})
        reference.wait()

    def has_reference(self) -> bool:
        """Says whether a complete reference is on disk."""
        return (self.directory / "reference" / "0").is_dir()

    def restore_reference(self, template: PyTree) -> PyTree:
        """Reads the reference parameters. Arrays and errors are those of `restore`."""
        if not self.has_reference():
            raise ValueError(f"no reference in {self.directory}")
        return self._open_reference().restore(0, template)[0]

    def wait(self) -> None:
        """Blocks until the save under way is on disk.

        Raises:
            RuntimeError: the save failed. The earlier checkpoints are untouched, and saving may go on.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._fail(error)
        self._saving = None
        self._clean_up("trash")

    def close(self) -> None:
        """Waits and raises as `wait` does, then ends the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._reference is not None:
                self._reference.close()

    def _open_reference(self) -> "Checkpoints":
        if self._reference is None:  # a checkpoint with one step
            self._reference = Checkpoints(self.directory / "reference", keep=1, read_only=self._read_only)
        return self._reference

    def _document(self, step: int) -> tuple[dict[str, Any], dict[str, Descriptions]]:
        """Returns the caller's JSON, and a description of what was stored of each item."""
        if step not in self.steps():
            raise ValueError(f"no checkpoint of step {step} in {self.directory}; there are {self.steps()}")
        try:
            args = ocp.args.Composite(extra=ocp.args.JsonRestore())
            return unseal(self._manager.restore(step, args=args)["extra"])
        except Exception as error:  # whatever orbax makes of a damaged file
            raise CorruptedCheckpoint(self.directory / str(step) / "extra", error) from error

    def _restore_item(self, step: int, item: str, saved: Descriptions, template: PyTree) -> PyTree:
        path = self.directory / str(step) / item
        restore_args = {leaf: ocp.RestoreArgs(restore_type=np.ndarray) for leaf in saved}
        args = ocp.args.PyTreeRestore(item=dict.fromkeys(saved, 0), restore_args=restore_args)
        try:
            leaves = self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except Exception as error:  # whatever orbax makes of a damaged file
            raise CorruptedCheckpoint(path, error) from error
        for leaf, description in saved.items():
            if describe(leaves[leaf]) != description:
                raise CorruptedCheckpoint(path / leaf, "its checksum does not match")
        return to_device(leaves, template)

    def _set_aside(self, step: int) -> None:
        if self._read_only:
            return
        target = self.directory / "corrupted" / str(step)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        (self.directory / str(step)).rename(target)
        self._manager.reload()

    def _fail(self, error: Exception) -> None:
        step = self._saving
        self._saving = None
        self._manager.reload()  # orbax forgets the steps that this one was to replace before it is written
        self._clean_up("*.orbax-checkpoint-tmp*")  # on a full disk its space is needed
        raise RuntimeError(
            f"the checkpoint of step {step} could not be written to {self.directory}: {one_line(error)}"
        ) from error

    def _clean_up(self, *patterns: str) -> None:
        # A rename is atomic, and a deletion is not. So orbax renames old steps to trash/ and leaves the
        # deletion to us, and a half-deleted step is never taken for a checkpoint. Its own clean-up of
        # temporary directories comes only before the next save, and never after a failed one.
        if not self._read_only:
            for path in (path for pattern in patterns for path in self.directory.glob(pattern)):
                shutil.rmtree(path, ignore_errors=True)


def _make_manager(directory: Path, keep: int, read_only: bool) -> ocp.CheckpointManager:
    if read_only:
        options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    else:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, todelete_subdir="trash")
    # Plain files, without OCDBT's database, take half the time for a gigabyte. There are more of them.
    handlers = {name: ocp.PyTreeCheckpointHandler(use_ocdbt=False) for name in ("state", *OTHER_ITEMS)}
    handlers["extra"] = ocp.JsonCheckpointHandler()
    return ocp.CheckpointManager(directory, item_handlers=handlers, options=options)


def _check_directory(directory: Path, read_only: bool) -> None:
    if read_only:
        if not directory.is_dir():
            raise ValueError(f"checkpoint directory {directory} does not exist")
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"x")
    except OSError as error:
        raise ValueError(f"checkpoint directory {directory} cannot be written: {one_line(error)}") from error


def _check_names(others: Mapping[str, Any] | None) -> dict[str, Any]:
    unknown = set(others or {}) - set(OTHER_ITEMS)
    if unknown:
        raise ValueError(
            f"checkpoint items {sorted(unknown)} are unknown; there are {', '.join(OTHER_ITEMS)}"
        )
    return dict(others or {})


class _WithoutOrbax(logging.Filter):
    # Orbax reports every save in tens of lines, and every error in a traceback, through the logger that all
    # users of absl share. Anything that matters is raised as an exception.
    def filter(self, record: logging.LogRecord) -> bool:
        return "/orbax/checkpoint/" not in record.pathname


_WITHOUT_ORBAX = _WithoutOrbax()
