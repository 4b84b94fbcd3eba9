"""The output folder of a training run: what it holds, which checkpoint to resume from, what may be
replaced. Read before torch is loaded."""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megaman import shell
from megaman.errors import UserError, summarize_error
from megaman.files import (
    ASIDE,
    is_inside,
    read_json,
    remove_folder,
    restore_former,
    safe_name,
)
from megaman.locks import claim, is_first_process
from megaman.threads import MAX_THREADS

if TYPE_CHECKING:
    from megaman.config.run_settings import OutputConfig

log = logging.getLogger(__name__)

# The files and folders that a run writes and may replace.
OUTPUTS = (
    r"(checkpoint|samples)-\d+|lora_weights(_best)?|training_config\.json|training_report(\.html)?"
)
STATE = "training_state.json"  # written last: a folder without it is not a checkpoint


@dataclass(frozen=True)
class OutputFolder:
    """A run's folder, the checkpoint that it resumes from, and the outputs of an earlier run that
    are deleted once this one can begin. The newest checkpoints_total_limit checkpoints are kept,
    or all of them if it is None. What is in at_end is called when the run ends or fails."""

    path: Path
    checkpoint: Path | None
    previous_outputs: tuple[Path, ...]
    checkpoints_total_limit: int | None = None
    at_end: ExitStack = field(default_factory=ExitStack, compare=False)

    @classmethod
    @contextmanager
    def open(cls, config: OutputConfig) -> Iterator[OutputFolder]:
        """Make or inspect the folder (see `inspect`), which no other run may use until the end of
        this context.

        Raises UserError if another run uses it.
        """
        path = Path(config.output_dir)
        with claim(path, "--output_dir"):
            checkpoint, previous_outputs = inspect(
                path, config.resume_from_checkpoint, config.overwrite_output
            )
            limit = config.checkpoints_total_limit
            output = cls(path, checkpoint, tuple(previous_outputs), limit)
            with output.at_end:
                yield output

    @property
    def lora_weights(self) -> Path:
        """The folder of the finished LoRA."""
        return self.path / "lora_weights"

    @property
    def best_weights(self) -> Path:
        """The folder of the LoRA with the lowest loss on held-out images."""
        return self.path / "lora_weights_best"

    def checkpoint_folder(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.path / f"checkpoint-{step}"

    def samples_folder(self, step: int) -> Path:
        """The folder of a step's sample images."""
        return self.path / f"samples-{step}"

    def later_checkpoints(self, step: int) -> list[Path]:
        """The checkpoints after this step, oldest first."""
        return [path for path in find_all(self.path) if step_of(path) > step]

    def resumes_in_place(self) -> bool:
        """Whether the run resumes from a checkpoint in this folder."""
        return self.checkpoint is not None and _is_in(self.checkpoint, self.path)

    def prune_checkpoints(self, step: int) -> None:
        """Delete the oldest checkpoints up to this step over the limit.

        Later ones are kept: they are left from before the run was resumed from an earlier step.
        """
        limit = self.checkpoints_total_limit
        if limit:
            for old in [path for path in find_all(self.path) if step_of(path) <= step][:-limit]:
                remove_folder(old)

    def delete_previous_outputs(self) -> None:
        """Delete what an earlier run left."""
        for path in self.previous_outputs:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def inspect(
    output_dir: Path, resume: str | None, overwrite: bool
) -> tuple[Path | None, list[Path]]:
    """The checkpoint to resume from, and the outputs of an earlier run that are to be deleted.

    Makes the folder if it is missing. Raises UserError if it holds an earlier run and no flag says
    what to do with that: no LoRA is overwritten by accident.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    if resume:
        tidy(output_dir)
    checkpoint = find(resume, output_dir) if resume else None
    outputs = [path for path in output_dir.iterdir() if re.fullmatch(OUTPUTS, path.name)]
    resumes_in_place = checkpoint is not None and _is_in(checkpoint, output_dir)
    is_unfinished = resume == "latest" and not (output_dir / "lora_weights").exists()
    if resumes_in_place or (is_unfinished and checkpoint is None):
        return checkpoint, []
    if outputs and not overwrite:
        remedy = "Name another --output_dir"
        if not resume:
            remedy = (
                "Resume with --resume_from_checkpoint latest, name another --output_dir, or add "
                "--overwrite_output"
            )
        raise UserError(f"--output_dir {output_dir} holds an earlier run", remedy)
    tidy(output_dir)
    return checkpoint, [path for path in outputs if path.exists()]


def _is_in(checkpoint: Path, folder: Path) -> bool:
    return checkpoint.resolve().parent == folder.resolve()


def tidy(output_dir: Path) -> None:
    """Delete the unfinished files and folders of a run that was killed while it saved, and put back
    what it had moved aside.

    Only the process with the claim does so: they could belong to a run that is saving just now.
    """
    if not is_first_process():
        return
    for path in sorted(output_dir.glob(f"*{ASIDE}")):
        if re.fullmatch(rf"({OUTPUTS})\.\d+(\.former)?{ASIDE}", path.name):
            restore_former(path)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def find_all(output_dir: Path) -> list[Path]:
    """The finished checkpoints in a folder, oldest first."""
    paths = output_dir.glob("checkpoint-*")
    named = [path for path in paths if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted([path for path in named if (path / STATE).is_file()], key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find(name: str, output_dir: Path) -> Path | None:
    """The folder that --resume_from_checkpoint means; None for "latest" if there is none yet.

    Raises UserError if a named folder is not a checkpoint.
    """
    if name == "latest":
        return next(reversed(find_all(output_dir)), None)
    for folder in (output_dir / name, Path(name)):
        if (folder / STATE).is_file():
            return folder
    known = ", ".join(path.name for path in find_all(output_dir)) or "none"
    raise UserError(
        f"--resume_from_checkpoint {name} is no checkpoint", f"In {output_dir} there is: {known}"
    )


def saved_threads(checkpoint: Path | None) -> int | None:
    """The number of CPU threads stored in a checkpoint, 0 if it has none; None without a
    checkpoint.

    checkpoint.read_train_state validates the rest of the file once torch is loaded.
    """
    if checkpoint is None:
        return None
    content = read_json(checkpoint / STATE)
    compute = content.get("choices") if isinstance(content, dict) else None
    threads = compute.get("threads") if isinstance(compute, dict) else None
    return threads if type(threads) is int and 0 < threads <= MAX_THREADS else 0


def choose_log_dir(saved: str | None, logging_dir: str, output_dir: Path) -> Path:
    """TensorBoard's folder: the resumed run's, or a new one, so that two runs never share a curve.

    It is made at once, if possible, since another run may begin in the same second. A downloaded
    checkpoint could name any folder: saved only counts if it is below logging_dir.
    """
    if saved and is_inside(saved, logging_dir):
        return Path(saved)
    name = f"{safe_name(output_dir.resolve().name)}-{time.strftime('%Y%m%d-%H%M%S')}"
    while True:
        folder = _unused(Path(logging_dir) / name)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not os.path.lexists(folder):  # logging_dir is a file
                return folder
        except OSError:  # which TensorBoard's first line reports
            return folder
        else:
            return folder


def tensorboard_command(logging_dir: str) -> str:
    """The command that shows the curves of all runs that log here."""
    return shell.join(["tensorboard", "--logdir", logging_dir])


def save_somewhere(preferred: Path, save: Callable[[Path], object]) -> tuple[Path, str]:
    """Save the finished LoRA in the preferred folder or, if that is not possible, in another place.

    Returns the folder and the reason if it is another one. Raises UserError if nothing works.
    """
    reason = ""
    for folder in _places(preferred):
        try:
            save(folder)
            return folder, reason
        except (OSError, UserError) as error:
            reason = reason or summarize_error(error)
    raise UserError(
        f"The LoRA can be saved neither in {preferred} nor elsewhere ({reason})",
        "Free some space and add --resume_from_checkpoint latest",
    )


def _places(preferred: Path) -> Iterator[Path]:
    """The preferred folder, then a new one in each place that there is and that can be written.

    A place is only looked for when it is needed: a container may have no home folder, the current
    folder may have been deleted, and the system may have no folder for temporary files.
    """
    yield preferred
    name = f"megaman_lora_rescued_{time.strftime('%Y%m%d-%H%M%S')}"
    for find_place in (Path.cwd, Path.home, tempfile.gettempdir):
        try:
            place = Path(find_place())
        except (OSError, RuntimeError):  # Path.home raises RuntimeError
            continue
        if place.is_absolute() and os.path.isdir(place):
            yield _unused(place / name)


def _unused(folder: Path) -> Path:
    """The folder itself or, if another run has just made it, one with a number."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], numbered) if not os.path.lexists(path))
