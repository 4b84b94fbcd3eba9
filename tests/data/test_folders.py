"""Layouts: however the same images and captions are laid out in a folder, the same pairs come out,
and what is wrong is reported."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megaman.config.train import parse_train_config
from megaman.data import metadata_files
from megaman.data.captions import caption_from_name
from megaman.data.dataset import MegaManDataset
from megaman.data.dataset_summary import fingerprint, summarize
from megaman.data.folders import MAX_WARNINGS, FolderConfig
from megaman.data.metadata_files import (
    Metadata,
    Row,
    inner_path,
    parse_csv,
    parse_jsonl,
    read_metadata,
)
from megaman.data.problems import check_usable, write_problems
from megaman.doctor.checks import examine
from megaman.doctor.report import write_report
from megaman.errors import UserError

PICTURES = sorted((ROOT / "demo" / "images").glob("volto_*.png"))[:24]
PAIRS = {
    (path.read_bytes(), path.with_suffix(".txt").read_text(encoding="utf-8").strip())
    for path in PICTURES
}


def caption_of(picture: Path) -> str:
    return picture.with_suffix(".txt").read_text(encoding="utf-8").strip()


def place(folder: Path, subfolder=lambda number: "", suffix: str = "") -> dict[str, str]:
    """Copy the 24 images into subfolders, with captions next to them if a suffix is given;
    {path: caption}."""
    placed = {}
    for number, picture in enumerate(PICTURES):
        target = folder / subfolder(number) / picture.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
        if suffix:
            target.with_suffix(suffix).write_text(caption_of(picture), encoding="utf-8")
        placed[target.relative_to(folder).as_posix()] = caption_of(picture)
    return placed


def write_jsonl(path: Path, placed: dict[str, str], key: str = "text", **more) -> None:
    lines = [
        json.dumps({"file_name": name, key: caption, **more}) for name, caption in placed.items()
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_csv(
    path: Path, placed: dict[str, str], key: str = "text", delimiter: str = ",", encoding="utf-8"
) -> None:
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(
            [["file_name", "size", key], *([n, 64, c] for n, c in placed.items())]
        )


def repeats(dataset: MegaManDataset) -> list[int]:
    return [example.repeats for example in dataset.examples]


def caption_warnings(dataset: MegaManDataset) -> list[tuple[Path, str]]:
    warnings = [example.caption_warning for example in dataset.examples]
    return [warning for warning in warnings if warning]


def flat(folder):
    place(folder, suffix=".txt")


def dot_caption(folder):
    place(folder, suffix=".caption")


def capitals(folder):
    place(folder, suffix=".TXT")


def subfolders(folder):
    place(folder, lambda number: ("", "poses", "poses/running", "2024_summer")[number % 4], ".txt")


def kohya(folder):
    place(folder, lambda number: ("10_volto", "3_volto robot")[number % 2], ".txt")


def jsonl(folder):
    write_jsonl(folder / "metadata.jsonl", place(folder))


def jsonl_caption(folder):
    write_jsonl(
        folder / "metadata.jsonl",
        place(folder),
        "caption",
        additional_feature=[1, {"a": None}],
        text=None,
    )


def jsonl_above(folder):
    write_jsonl(folder / "metadata.jsonl", place(folder, lambda number: f"train/{number % 3}"))


def jsonl_backslashes(folder):
    placed = place(folder, lambda number: f"train/{number % 3}")
    write_jsonl(
        folder / "metadata.jsonl",
        {".\\" + name.replace("/", "\\"): caption for name, caption in placed.items()},
    )


def jsonl_in_each(folder):
    placed = place(folder, lambda number: ("a", "b")[number % 2])
    for part in "ab":
        own = {
            Path(name).name: caption for name, caption in placed.items() if name.startswith(part)
        }
        write_jsonl(folder / part / "metadata.jsonl", own)


def csv_comma(folder):
    write_csv(folder / "metadata.csv", place(folder))


def csv_spreadsheet(folder):
    write_csv(
        folder / "metadata.csv", place(folder, lambda number: "train"), "caption", ";", "utf-8-sig"
    )


def jsonl_utf_16(folder):
    jsonl(folder)
    path = folder / "metadata.jsonl"
    path.write_bytes(path.read_text(encoding="utf-8").encode("utf-16"))


def mixed(folder):
    """Eight by a metadata file, eight with .txt, eight with .caption."""
    placed = place(folder)
    for number, (name, caption) in enumerate(placed.items()):
        if number >= 8:
            (folder / name).with_suffix((".txt", ".caption")[number % 2]).write_text(
                caption, encoding="utf-8"
            )
    write_jsonl(folder / "metadata.jsonl", dict(list(placed.items())[:8]))


LAYOUTS = [
    flat,
    dot_caption,
    capitals,
    subfolders,
    kohya,
    jsonl,
    jsonl_caption,
    jsonl_above,
    jsonl_backslashes,
    jsonl_in_each,
    csv_comma,
    csv_spreadsheet,
    jsonl_utf_16,
    mixed,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_gives_the_same_pairs(tmp_path, layout):
    assert len(PAIRS) == 24
    layout(tmp_path)
    dataset = MegaManDataset(tmp_path, None)
    pairs = [(example.image.read_bytes(), example.caption) for example in dataset.examples]
    assert len(pairs) == 24 and set(pairs) == PAIRS
    assert dataset.num_written_captions == 24 and caption_warnings(dataset) == []
    assert dataset.skipped == {} and dataset.metadata_warnings == []


def test_what_was_found_is_said(tmp_path):
    mixed(tmp_path)
    dataset = MegaManDataset(tmp_path, None, config=FolderConfig(repeats=2))
    assert summarize(dataset, 30, False) == [
        f"images     24 in {tmp_path}, 30 crops",
        "captions   8 from metadata.jsonl, 8 from .txt files, 8 from .caption files",
        f"repeats    {tmp_path.name} x 2: 48 images an epoch",
    ]


def test_kohyas_folders_have_repeats(tmp_path):
    kohya(tmp_path)
    dataset = MegaManDataset(tmp_path, None)
    by_folder = {example.image.parent.name: example.repeats for example in dataset.examples}
    assert by_folder == {"10_volto": 10, "3_volto robot": 3}
    twice = MegaManDataset(tmp_path, None, config=FolderConfig(repeats=2))
    assert repeats(twice) == [2 * count for count in repeats(dataset)]
    epoch = dataset.epoch_indices()
    assert [epoch.count(index) for index in range(24)] == repeats(dataset)
    assert len(epoch) == 12 * 13
    assert (
        summarize(dataset, 24, False)[2]
        == "repeats    3_volto robot x 3, 10_volto x 10: 156 images an epoch"
    )
    dataset.drop({dataset.examples[0].image: "gone"})
    assert len(dataset.examples) == 23
    assert sum(len(captions) for _, captions in dataset.by_folder().values()) == 23


def test_without_a_caption_file_the_name_of_kohyas_folder_is_the_caption(tmp_path):
    place(
        tmp_path,
        lambda number: ("10_volto, blue_robot", "5_", "0_away", "9999_volto", "plain")[
            min(number, 4)
        ],
    )
    nested = tmp_path / "10_volto, blue_robot" / "running"
    nested.mkdir()
    shutil.copy(PICTURES[0], nested / "again.png")
    (nested / "again.txt").touch()
    dataset = MegaManDataset(tmp_path, None)
    captions = {
        example.image.relative_to(tmp_path).parts[0]: (
            example.caption,
            example.repeats,
            example.source,
        )
        for example in dataset.examples
    }
    assert captions == {
        "10_volto, blue_robot": ("volto, blue_robot", 10, "made from folder names"),
        "5_": (caption_from_name(PICTURES[1]), 5, "made from file names"),
        "9999_volto": (caption_from_name(PICTURES[3]), 1, "made from file names"),
        "plain": (caption_from_name(PICTURES[-1]), 1, "made from file names"),
    }
    assert dataset.num_written_captions == 0, "no caption was written"
    (reason,) = dataset.skipped.values()
    assert "0_away" in reason
    (warning,) = caption_warnings(dataset)
    assert warning == (
        nested / "again.txt",
        "holds no text: the caption was made from the folder's name",
    )


def test_the_folder_that_is_named_itself_has_no_number(tmp_path):
    folder = tmp_path / "10_volto"
    flat(folder)
    assert set(repeats(MegaManDataset(folder, None))) == {1}


def test_one_extension_alone(tmp_path):
    place(tmp_path, suffix=".txt")
    first = tmp_path / PICTURES[0].name
    first.with_suffix(".caption").write_text("the other", encoding="utf-8")
    assert MegaManDataset(tmp_path, None).captions[0] == caption_of(PICTURES[0])
    dataset = MegaManDataset(tmp_path, None, config=FolderConfig(caption_extension=".caption"))
    assert dataset.captions[0] == "the other" and dataset.num_written_captions == 1
    assert (
        summarize(dataset, 24, False)[1]
        == "captions   23 made from file names, 1 from .caption files"
    )


def test_pictures_without_a_caption_are_counted_and_named(tmp_path):
    place(tmp_path, suffix=".txt")
    (tmp_path / PICTURES[3].name).with_suffix(".txt").unlink()
    dataset = MegaManDataset(tmp_path, None)
    lines = write_problems(tmp_path / "out.json", [dataset])
    assert len(lines) == 1 and "1 made from names" in lines[0]
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    picture = tmp_path / PICTURES[3].name
    assert content["made_captions"] == [
        {"path": str(picture), "caption": caption_from_name(picture)}
    ]


def test_what_a_metadata_file_names_wrongly_is_reported_by_line(tmp_path):
    outside = tmp_path / "outside.png"
    shutil.copy(PICTURES[0], outside)
    folder = tmp_path / "data"
    place(folder, lambda number: ("", "sub")[number % 2])
    a, b, c, d = (picture.name for picture in PICTURES[:4])
    (folder / "sub" / "loop.png").symlink_to(outside)
    (folder / "notes.txt").write_text("no picture")
    rows = [
        {"file_name": a, "text": "one"},
        "no json",
        {"file_name": "../outside.png", "text": "two"},
        {"file_name": str(outside), "text": "three"},
        {"file_name": "C:\\pictures\\a.png", "text": "four"},
        {"file_name": "sub/loop.png", "text": "five"},
        {"file_name": "gone.png", "text": "six"},
        {"file_name": a, "text": "seven"},
        {"file_name": "notes.txt", "text": "eight"},
        ["a list"],
        {"text": "nine"},
        {"file_name": f"sub/{b}", "text": " "},
        {"file_name": c, "caption": "ten"},
    ]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "sub" / d).with_suffix(".txt").write_text("a file of its own", encoding="utf-8")
    dataset = MegaManDataset(folder, None)
    used = {example.image.name: example.caption for example in dataset.examples}
    assert used == {a: "one", b: caption_from_name(PICTURES[1]), c: "ten", d: "a file of its own"}
    texts = [text for _, text in dataset.metadata_warnings]
    lines = {int(text.split(":")[0].removeprefix("line ")) for text in texts}
    assert lines == {2, 3, 4, 5, 6, 8, 9, 10, 11, 12}
    assert {path.name for path, _ in dataset.metadata_warnings} == {"metadata.jsonl"}
    assert dataset.skipped[folder / "gone.png"] == "is not there: metadata.jsonl names it in line 7"
    assert "may not name (line 6)" in dataset.skipped[folder / "sub" / "loop.png"]
    others = {path for path, reason in dataset.skipped.items() if "does not name it" in reason}
    assert len(others) == 20 and len(dataset.skipped) == 22


@pytest.mark.parametrize(
    "name", ["metadata.tsv", "METADATA.xlsx", "Metadata.csv", "metadata.json", "meta_cap.json"]
)
def test_a_metadata_file_that_is_not_read_is_named(pictures, name):
    (pictures / name).write_text("file_name\ttext\nmegaman_01.png\tvolto", encoding="utf-8")
    if name == "Metadata.csv" and (pictures / "metadata.csv").exists():
        pytest.skip("upper and lower case are the same here")
    warnings = MegaManDataset(pictures, None).metadata_warnings
    assert warnings == [
        (pictures / name, "is not read: its name has to be metadata.csv or metadata.jsonl")
    ]


def test_the_doctor_reports_metadata_lines(tmp_path):
    placed = place(tmp_path)
    write_jsonl(tmp_path / "metadata.jsonl", placed | {"../\ud800.png": "out"})
    report = examine(MegaManDataset(tmp_path, None), 64)
    (finding,) = [finding for finding in report.findings if finding.kind == "metadata"]
    assert (
        "metadata.jsonl line 25: ../\\ud800.png leads out of the folder" in finding.title
        and report.is_wrong
    )
    write_report(tmp_path / "out", report)


@pytest.mark.parametrize("value", ["caption", ".caption", ".en.txt"])
def test_an_extension_has_its_dot(value):
    assert (
        parse_train_config(["--caption_extension", value]).captions.caption_extension
        == f".{value.removeprefix('.')}"
    )


@pytest.mark.parametrize("value", ["", ".", "a/b", "..", ".png", "JPG", ".x.webp", "a b", "\x1b"])
def test_what_is_no_extension_of_a_caption_file(value, capsys):
    with pytest.raises(SystemExit):
        parse_train_config(["--caption_extension", value])
    assert capsys.readouterr().err.startswith("error: --caption_extension: ")


def test_metadata_counts_before_a_caption_file_and_the_difference_is_said(tmp_path):
    placed = place(tmp_path, suffix=".txt")
    write_jsonl(
        tmp_path / "metadata.jsonl", {name: f"{caption}!" for name, caption in placed.items()}
    )
    dataset = MegaManDataset(tmp_path, None)
    assert dataset.captions == [f"{caption_of(path)}!" for path in PICTURES]
    text = "says something else than metadata.jsonl, which counts"
    assert caption_warnings(dataset) == [
        ((tmp_path / path.name).with_suffix(".txt"), text) for path in PICTURES
    ]


def test_a_table_that_is_not_imagefolders_changes_nothing(tmp_path):
    place(tmp_path, suffix=".txt")
    (tmp_path / "metadata.csv").write_text("id,url\n1,somewhere\n", encoding="utf-8")
    dataset = MegaManDataset(tmp_path, None)
    assert dataset.captions == [caption_of(path) for path in PICTURES]
    (warning,) = dataset.metadata_warnings
    assert "no column file_name" in warning[1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_and_giants_are_not_opened(tmp_path):
    place(tmp_path, suffix=".txt")
    os.mkfifo(tmp_path / "metadata.csv")
    with open(tmp_path / "metadata.jsonl", "wb") as file:
        file.truncate(metadata_files.MAX_FILE_SIZE + 1)
    dataset = MegaManDataset(tmp_path, None)
    warnings = [text for _, text in dataset.metadata_warnings]
    assert len(dataset) == 24 and all("cannot be read" in text for text in warnings)
    assert len(warnings) == 2


def test_many_warnings_are_counted(tmp_path):
    place(tmp_path, suffix=".txt")
    (tmp_path / "metadata.jsonl").write_text("nonsense\n" * 50, encoding="utf-8")
    warnings = [text for _, text in MegaManDataset(tmp_path, None).metadata_warnings]
    assert len(warnings) == MAX_WARNINGS + 1
    assert warnings[-1] == f"and {50 - MAX_WARNINGS} lines more"


def test_the_digest_tells_other_repeats_and_captions_apart(tmp_path):
    flat(tmp_path)
    first = fingerprint(MegaManDataset(tmp_path, None))
    assert (
        fingerprint(MegaManDataset(tmp_path, None))
        == first
        != fingerprint(MegaManDataset(tmp_path, None, config=FolderConfig(repeats=2)))
    )


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a.png", "a.png"),
        ("sub/a.png", "sub/a.png"),
        ("sub\\a.png", "sub/a.png"),
        ("./a.png", "a.png"),
        ("sub//./a.png", "sub/a.png"),
        ("..a/a..png", "..a/a..png"),
        ("../a.png", None),
        ("sub/../a.png", None),
        ("sub\\..\\..\\a.png", None),
        ("/etc/a.png", None),
        ("\\\\server\\a.png", None),
        ("C:\\a.png", None),
        ("c:a.png", None),
        (".", None),
    ],
)
def test_paths_stay_inside(name, path):
    inner = inner_path(name)
    assert (inner and inner.as_posix()) == path


@given(st.text(max_size=30))
def test_no_path_leaves_the_folder(name):
    inner = inner_path(name)
    assert inner is None or not (inner.is_absolute() or ".." in inner.parts)


def rows_of(metadata: Metadata) -> list[Row]:
    assert metadata.rows is not None
    return metadata.rows


NAME = st.text("ab1 _-.é洛/", min_size=1, max_size=12).filter(str.strip)
WORDS = st.text("ab,;\" '\tö洛\u2028", max_size=20)


@given(
    st.lists(st.tuples(NAME, WORDS), min_size=1, max_size=6), st.sampled_from(["text", "caption"])
)
def test_jsonl_comes_back(rows, key):
    lines = [
        json.dumps({"n": 1, "file_name": name, key: caption}, ensure_ascii=False)
        for name, caption in rows
    ]
    metadata = parse_jsonl("\r\n".join(lines))
    assert metadata.warnings == []
    wanted = [(name.strip(), " ".join(caption.split())) for name, caption in rows]
    assert [(row.file_name, row.caption) for row in rows_of(metadata)] == wanted
    assert [row.line for row in rows_of(metadata)] == list(range(1, len(rows) + 1))


@given(st.lists(st.tuples(NAME, WORDS), min_size=1, max_size=6), st.sampled_from(",;\t"))
def test_csv_comes_back(rows, delimiter):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows(
        [["file_name", "n", "text"], *([n, 1, caption] for n, caption in rows)]
    )
    metadata = parse_csv(file.getvalue())
    assert metadata.warnings == []
    assert [(row.file_name, row.caption) for row in rows_of(metadata)] == [
        (n.strip(), " ".join(s.split())) for n, s in rows
    ]


LINES = ['{"file_name": "a.png", "text": "b"}', '{"file_name": "a.png"', "[]", "x", '{"a": 1}']


@given(st.lists(st.sampled_from(LINES), max_size=8))
def test_a_bad_line_costs_only_itself(lines):
    metadata = parse_jsonl("\n".join(lines))
    good = [number for number, line in enumerate(lines, start=1) if line.endswith('"b"}')]
    assert [row.line for row in metadata.rows or []] == good
    bad = [number for number, line in enumerate(lines, start=1) if number not in good]
    assert [warning.split(":")[0] for warning in metadata.warnings] == [
        f"line {number}" for number in bad
    ]


def test_a_quotation_mark_too_few_costs_only_its_line():
    metadata = parse_csv(
        'file_name,text\na.png,one\nb.png,"two\nc.png,three\nd.png,"fo"ur\ne.png,"five, ""5"""\n'
    )
    assert metadata.rows == [
        Row(2, "a.png", "one"),
        Row(4, "c.png", "three"),
        Row(6, "e.png", 'five, "5"'),
    ]
    assert [warning.split(":")[0] for warning in metadata.warnings] == ["line 3", "line 5"]


@given(
    st.binary(max_size=200) | st.text('file_name,text"\n;{}[]:a\0', max_size=120).map(str.encode)
)
def test_any_bytes_are_read(tmp_path_factory, content):
    for name in metadata_files.NAMES:
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(b"file_name,text\n" * name.endswith("csv") + content)
        metadata = read_metadata(path)
        lines = content.count(b"\n") + content.count(b"\r") + 2
        assert all(1 <= row.line <= lines and row.file_name.strip() for row in metadata.rows or [])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,text\n" + 'a","b\n' * 200_000),
        ("metadata.csv", "file_name,text\n" + 'a,"b"c\n' * 200_000),
        ("metadata.csv", 'file_name,text\n"' + "x" * 2_000_000),
        ("metadata.jsonl", "[" * 500_000),
        ("metadata.jsonl", '{"file_name": ' + "9" * 500_000 + "}"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "' + "é" * 600_000 + '"}'),
        ("metadata.jsonl", "x\n" * 500_000),
    ],
    ids=[
        "rows without an end",
        "bad rows",
        "one quotation mark",
        "brackets",
        "figures",
        "a long caption",
        "bad lines",
    ],
)
def test_hostile_files_end(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode("cp1252"))
    metadata = read_metadata(path)
    assert len(metadata.warnings) <= metadata_files.MAX_BAD_LINES + 2


def test_names_that_are_no_unicode_and_names_of_controls(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    rows = [
        '{"file_name": "a.png", "text": "\\ud800 one\\u0000 \\u001b[2J"}',
        '{"file_name": "\\ud800.png"}',
        '{"file_name": "a\\u0000b.png"}',
        '{"file_name": "\\u001b[2J.png"}',
        json.dumps({"file_name": "a/" * 4000}),
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    dataset = MegaManDataset(tmp_path, None)
    assert dataset.captions == ["one [2J"]
    lines = write_problems(tmp_path / "out.json", [dataset])
    assert len(dataset.skipped) == 4 and all(line.isprintable() for line in lines)


def sorted_out_by_kohya(folder: Path) -> None:
    place(folder, lambda number: "0_away" if number else "10_volto", ".txt")


def sorted_out_by_metadata(folder: Path) -> None:
    write_jsonl(folder / "metadata.jsonl", dict(list(place(folder).items())[:1]))


def sorted_out_by_csv_below(folder: Path) -> None:
    placed = place(folder, lambda number: "below")
    write_csv(folder / "metadata.csv", dict(list(placed.items())[:1]))


@pytest.mark.parametrize(
    "layout", [sorted_out_by_kohya, sorted_out_by_metadata, sorted_out_by_csv_below]
)
def test_what_is_sorted_out_on_purpose_is_no_bad_file(tmp_path, layout):
    layout(tmp_path / "images")
    dataset = MegaManDataset(tmp_path / "images", None)
    dataset.check()
    assert (len(dataset), len(dataset.sorted_out), len(dataset.skipped)) == (1, 23, 23)
    check_usable([dataset], skip_bad=False)
    report = examine(dataset, 64)
    assert {finding.kind: finding.is_wrong for finding in report.findings}["sorted_out"] is False
    assert "unreadable" not in {finding.kind for finding in report.findings}
    write_report(tmp_path / "out", report)
    problems = json.loads((tmp_path / "out" / "dataset_report.json").read_text(encoding="utf-8"))
    assert len(problems["pictures"]) == 24, "each is named"
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes(b"")
        (tmp_path / "images" / name).with_suffix(".txt").write_text("bad")
    dataset = MegaManDataset(tmp_path / "images", None)
    dataset.check()
    with pytest.raises(UserError, match="2 of the 3 files"):
        check_usable([dataset], skip_bad=False)


@pytest.mark.parametrize(
    ("lines", "caption"),
    [
        (["file_name,text", "a.png,volto, blue robot, running"], "volto, blue robot, running"),
        (["file_name,text", "a.png,volto,blue robot"], "volto,blue robot"),
        (["file_name;text", "a.png;volto; blue robot"], "volto; blue robot"),
        (["file_name|text", "a.png|volto, blue robot"], "volto, blue robot"),
        (["sep=;", "file_name;text", "a.png;volto, blue robot"], "volto, blue robot"),
        (["", " ", "file_name,text", "a.png,volto, blue robot"], "volto, blue robot"),
        (["file_name, text", 'a.png, "volto, blue robot"'], "volto, blue robot"),
        (["file_name,text", "a.png,“volto, blue robot”"], "volto, blue robot"),
        (["file_name,text", "a.png,'volto, blue robot'"], "volto, blue robot"),
        (["file_name;text", "a.png;‘volto, blue robot’"], "volto, blue robot"),
        (["file_name\ttext", "“a.png”\t“volto”"], "volto"),
        (["file_name,text", r'a.png,"volto, \"blue\" robot"'], 'volto, "blue" robot'),
        (["file_name,text", 'a.png,volto,"blue" robot'], 'volto,"blue" robot'),
        (["file_name,text,width", "a.png,volto, blue robot,64"], "volto, blue robot"),
        (["file_name,width,text", "a.png,64,volto,blue robot"], "volto,blue robot"),
        (["file_name,split,text", "a.png,train,volto, blue robot"], "volto, blue robot"),
        (["text,file_name", "volto, blue robot,a.png"], "volto, blue robot"),
        (["file_name,text,,", "a.png,volto, blue,robot"], "volto, blue,robot"),
        (["file_name,text", "a.png,volto,,"], "volto"),
        (["File Name,Caption", "a.png,volto, blue robot"], "volto, blue robot"),
        (["a.png,volto, blue robot"], "volto, blue robot"),
    ],
)
def test_a_table_as_people_write_it(lines, caption):
    metadata = parse_csv("\n".join(lines))
    assert metadata.warnings == []
    assert rows_of(metadata) == [Row(len(lines), "a.png", caption)]


@pytest.mark.parametrize(
    "lines",
    [
        ["file_name,text,split", "a.png,volto,blue,train"],
        ["file_name,text,split", "a.png,volto, blue"],
        ["file_name,split,text", "a.png,train,volto,blue"],
        ["file_name,text,caption", "a.png,volto,blue,red"],
        ["file_name,width,text", "a.png,64"],
        ["file_name,text", 'a.png,"volto', 'b.png,blue"'],
    ],
)
def test_a_row_that_is_not_certain_is_reported_and_not_used(tmp_path, lines):
    for name in ("a.png", "c.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    header = lines[0].split(",")
    good = {"file_name": "c.png", "text": "good", "caption": "good", "split": "x", "width": "1"}
    lines = [*lines, ",".join(good[column] for column in header)]
    (tmp_path / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    dataset = MegaManDataset(tmp_path, None)
    assert dataset.captions == ["good"]
    assert any(text.startswith("line 2: ") for _, text in dataset.metadata_warnings)
    assert "line" in dataset.skipped[tmp_path / "a.png"] and dataset.sorted_out == {}
    findings = {finding.kind: finding.is_wrong for finding in examine(dataset, 64).findings}
    assert findings["metadata"] and findings["unreadable"]
    (tmp_path / "a.txt").write_text("its own", encoding="utf-8")
    assert MegaManDataset(tmp_path, None).captions == ["its own", "good"]


def test_rows_in_a_guessed_encoding_are_used_and_remarked_on(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    table = "file_name,text\na.png,蓝色机器人, 站立\n"
    (tmp_path / "metadata.csv").write_bytes(table.encode("gbk"))
    dataset = MegaManDataset(tmp_path, None)
    assert dataset.captions == ["蓝色机器人, 站立"]
    findings = {finding.kind: finding for finding in examine(dataset, 64).findings}
    assert "metadata" not in findings and not findings["metadata_encoding"].is_wrong
    assert "read as GBK" in findings["metadata_encoding"].title


OBJECTS = [{"filename": "a.png", "text": "one"}, {"filename": "b.png", "text": "two"}]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(OBJECTS),
        json.dumps(OBJECTS, indent=2),
        "\n".join(json.dumps(entry, indent=2) for entry in OBJECTS),
        ",\n".join(map(json.dumps, OBJECTS)),
        json.dumps({"images": OBJECTS}, indent=1),
        json.dumps({"a.png": "one", "b.png": {"caption": "two"}}),
        '{"image": "a.png", "caption": "one"}\n{"image": "b.png", "caption": "two"}',
        '{"Image Path": "a.png", "prompt": "one"}\n{"file": "b.png", "description": "two"}',
        '{"file_name": "a.png", "text": null, "tags": ["one"]}\n{"path": "./b.png", "text": "two"}',
    ],
)
def test_json_as_people_write_it(tmp_path, content):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text(content, encoding="utf-8")
    dataset = MegaManDataset(tmp_path, None)
    assert (dataset.captions, dataset.num_written_captions) == (["one", "two"], 2)
    assert (dataset.metadata_warnings, dataset.skipped) == ([], {})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", "no JSON at all"),
        ("metadata.jsonl", "[]"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": 3}'),
        ("metadata.jsonl", '{"id": 1, "text": "one"}'),
        ("metadata.csv", "id,url\n1,somewhere"),
        ("metadata.csv", "file_name,label\na.png,3"),
        ("metadata.csv", '{"file_name": "a.png", "text": "one"}'),
    ],
)
def test_a_metadata_file_that_is_not_understood_ends_the_run(tmp_path, name, content):
    for image in ("a.png", "sub/b.png"):
        (tmp_path / image).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / image)
    (tmp_path / name).write_text(content, encoding="utf-8")
    dataset = MegaManDataset(tmp_path, None)
    assert dataset.captions == [], "none is made from a name"
    with pytest.raises(UserError, match=rf"{name} .*") as error:
        check_usable([dataset], skip_bad=False)
    assert "--skip_bad_images" in str(error.value.remedy)
    (tmp_path / "a.txt").write_text("its own", encoding="utf-8")
    dataset = MegaManDataset(tmp_path, None)
    assert dataset.captions == ["its own"]
    with pytest.raises(UserError, match=name):
        check_usable([dataset], skip_bad=False)
    check_usable([dataset], skip_bad=True)
    (tmp_path / "sub" / "b.txt").write_text("its own", encoding="utf-8")
    check_usable([MegaManDataset(tmp_path, None)], skip_bad=False)
