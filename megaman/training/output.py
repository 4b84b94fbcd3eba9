"""The output folder of a training run: what stands there, which checkpoint to go on from, what may
be replaced."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from megaman.errors import UserError, summarize_error
from megaman.files import ASIDE, is_inside, read_json, restore_former, safe_name
from megaman.threads import MAX_THREADS

OURS = r"(checkpoint|samples)-\d+|lora_weights|training_config\.json"
STATE = "training_state.json"  # written into a checkpoint last: a folder without it is none


def open_output(
    output_dir: Path, resume: str | None, overwrite: bool
) -> tuple[Path | None, list[Path]]:
    """The checkpoint to go on from, or None; and what an earlier run left that is to go once this
    one can begin.

    Raises UserError where that was not asked for: nobody's LoRA is overwritten unmeant.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    if resume:
        tidy(output_dir)
    checkpoint = find(resume, output_dir) if resume else None
    leftovers = [path for path in output_dir.iterdir() if re.fullmatch(OURS, path.name)]
    continues = checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve()
    barely_begun = resume == "latest" and not (output_dir / "lora_weights").exists()
    if continues or (barely_begun and not checkpoint):
        return checkpoint, []
    if leftovers and not overwrite:
        ways = "Go on with --resume_from_checkpoint latest, name another --output_dir, or add --overwrite_output"
        raise UserError(
            f"--output_dir {output_dir} holds an earlier run",
            "Name another --output_dir" if resume else ways,
        )
    tidy(output_dir)
    return checkpoint, [path for path in leftovers if path.exists()]


def tidy(output_dir: Path) -> None:
    """Clear away what a run that was killed while it saved left unfinished, and put back what it
    had moved aside."""
    for path in sorted(output_dir.glob(f"*{ASIDE}")):
        if re.fullmatch(rf"({OURS})\.\d+(\.former)?{ASIDE}", path.name):
            restore_former(path)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def remove(leftovers: Iterable[Path]) -> None:
    """Delete what open_output found of an earlier run."""
    for path in leftovers:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def find_all(output_dir: Path) -> list[Path]:
    """The finished checkpoints in a folder, oldest first."""
    found = [
        path
        for path in output_dir.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name)
    ]
    return sorted((path for path in found if (path / STATE).is_file()), key=step_of)


def saved_threads(checkpoint: Path | None) -> int | None:
    """The number of CPU threads noted in a checkpoint, 0 if it has none; None without a checkpoint.

    The rest of the file is checked by checkpoint.read_train_state.
    """
    if checkpoint is None:
        return None
    content = read_json(checkpoint / STATE)
    choices = content.get("choices") if isinstance(content, dict) else None
    threads = choices.get("threads") if isinstance(choices, dict) else None
    return threads if type(threads) is int and 0 < threads <= MAX_THREADS else 0


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find(wanted: str, output_dir: Path) -> Path | None:
    """The folder that --resume_from_checkpoint means; None under "latest" where there is none yet.

    Raises UserError where a named folder is no checkpoint.
    """
    if wanted == "latest":
        return next(reversed(find_all(output_dir)), None)
    for folder in (output_dir / wanted, Path(wanted)):
        if (folder / STATE).is_file():
            return folder
    known = ", ".join(path.name for path in find_all(output_dir)) or "none"
    raise UserError(
        f"--resume_from_checkpoint {wanted} is no checkpoint", f"In {output_dir} there is: {known}"
    )


def log_dir_of(saved: str | None, logging_dir: str, output_dir: Path) -> Path:
    """TensorBoard's folder: the resumed run's, or a folder of its own, so that two runs never share
    a curve.

    A stranger's checkpoint could name any folder: saved counts only where it lies under
    logging_dir.
    """
    if saved and is_inside(saved, logging_dir):
        return Path(saved)
    return _new_log_dir(Path(logging_dir), safe_name(output_dir.resolve().name))


def _new_log_dir(logging_dir: Path, name: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    taken = [
        logging_dir / f"{name}-{stamp}{suffix}"
        for suffix in ["", *(f"-{i}" for i in range(2, 100))]
    ]
    return next(path for path in taken if not path.exists())


def save_somewhere(wanted: Path, save: Callable[[Path], object]) -> tuple[Path, str]:
    """Save the finished LoRA in the wanted folder or, where that cannot be written, in the next
    best place.

    Returns the folder, and why it is another one ("" where it is not). Raises UserError where no
    place takes it.
    """
    rescued = f"megaman_lora_rescued_{time.strftime('%Y%m%d-%H%M%S')}"
    others = [parent / rescued for parent in (Path.cwd(), Path.home(), Path(tempfile.gettempdir()))]
    reason = ""
    for folder in (wanted, *others):
        try:
            save(folder)
            return folder, reason
        except (OSError, UserError) as error:
            reason = reason or summarize_error(error)
    raise UserError(
        f"The LoRA can be saved neither in {wanted} nor elsewhere ({reason})",
        "Free some space and add --resume_from_checkpoint latest",
    )
