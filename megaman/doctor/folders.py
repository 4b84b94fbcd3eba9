"""Check the folders of a run and write a report on each: the images to learn and the class
images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaman.doctor.checks import examine
from megaman.doctor.report import CLASS_DATA, CLASS_PAGE, write_report

if TYPE_CHECKING:
    from megaman.data.dataset import MegaManDataset


def check_folders(
    images: MegaManDataset,
    class_images: MegaManDataset | None,
    resolution: int,
    trigger: str | None,
    output_dir: Path,
    progress_bar: Callable[..., Iterable[Any]],
) -> tuple[list[str], bool]:
    """Examine both datasets and write the reports; returns the summaries as lines for the console,
    and whether anything is wrong for sure.

    The class images must not have the trigger words, given or inferred. Raises UserError as
    `report.write_report` does.
    """
    bar = partial(progress_bar, total=len(images))
    result = examine(images, resolution, trigger, bar)
    lines = write_report(output_dir, result)
    if class_images is None:
        return lines, result.is_wrong
    bar = partial(progress_bar, total=len(class_images))
    class_result = examine(class_images, resolution, result.trigger, bar, is_class=True)
    lines += write_report(output_dir, class_result, CLASS_PAGE, CLASS_DATA)
    return lines, result.is_wrong or class_result.is_wrong
