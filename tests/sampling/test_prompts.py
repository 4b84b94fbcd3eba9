"""The prompts file: three kinds of lines, comments and blank lines skipped, one line for whatever
is wrong."""

from __future__ import annotations

import os
import re
import shlex
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaman.errors import UserError
from megaman.sampling.prompts import BUILT_IN, Prompt, load_prompts, read_prompts


def texts(path: Path) -> list[str]:
    """The prompts of a file in which nothing is wrong and no line has options."""
    prompts, remarks = read_prompts(path)
    assert remarks == [] and all(prompt == Prompt(prompt.text) for prompt in prompts)
    return [prompt.text for prompt in prompts]


@pytest.fixture
def read(tmp_path):
    """What read_prompts says of some text, without the file's name before each remark."""

    def read(text: str) -> tuple[list[Prompt], list[str]]:
        path = tmp_path / "prompts.txt"
        path.write_text(text, encoding="utf-8")
        prompts, remarks = read_prompts(path)
        assert all(remark.startswith(f"{path} line ") for remark in remarks)
        return prompts, [remark.removeprefix(f"{path} ") for remark in remarks]

    return read


def test_one_prompt_a_line_in_order(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "# mine\n\n  mega man,  blue robot \n\t# another comment\n"
        "洛克人, 藍色機器人\n   \nlast, no line end # here"
    )
    assert texts(path) == ["mega man, blue robot", "洛克人, 藍色機器人", "last, no line end # here"]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_line_ends_and_byte_order_mark(tmp_path, ending, encoding):
    path = tmp_path / "prompts.txt"
    path.write_bytes(ending.join(["# first", "café", "", "robot", ""]).encode(encoding))
    assert texts(path) == ["café", "robot"]


def test_there_are_ten_built_in_ones():
    prompts = texts(BUILT_IN)
    assert len(prompts) == len(set(prompts)) == 10
    assert all("mega man" in prompt.lower() or "robot" in prompt.lower() for prompt in prompts)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"# only\n#comments", b"\xef\xbb\xbf"])
def test_no_prompt_in_the_file(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"--prompts_file .*empty\.txt has no prompt.*one prompt a line"
    ):
        read_prompts(path)


def test_a_missing_file_a_folder_and_another_encoding(tmp_path):
    with pytest.raises(UserError, match=r"--prompts_file .*none\.txt is missing"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"--prompts_file .* cannot be read"):
        read_prompts(tmp_path)
    (tmp_path / "western.txt").write_bytes("mega man, Größe".encode("latin-1"))
    with pytest.raises(UserError, match=r"western\.txt is not UTF-8 text.*Save it as UTF-8"):
        read_prompts(tmp_path / "western.txt")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_with_its_mark(tmp_path, encoding):
    path = tmp_path / "wide.txt"
    path.write_bytes("\ufeff# mine\r\n洛克人 🤖\r\nrobot\r\n".encode(encoding))
    assert texts(path) == ["洛克人 🤖", "robot"]
    path.write_bytes("no mark".encode(encoding))
    with pytest.raises(UserError, match="contains NUL characters"):
        read_prompts(path)
    path.write_bytes("\ufeffab".encode(encoding)[:-1])
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_prompts(path)


def test_control_characters_and_exotic_line_ends(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("blue\x07 \x1b[31mrobot\x0bsecond\u2028third\x7f\x9b\u202e".encode())
    assert texts(path) == ["blue [31mrobot second third \u202e"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\f", "\v", "\x85", "\x1c", "\x1d", "\x1e"])
def test_a_line_ends_with_a_line_end_alone(read, mark):
    prompts, warnings = read(f"a blue{mark}robot{mark}--w 64\nb")
    assert [prompt.text for prompt in prompts] == ["a blue robot", "b"]
    assert prompts[0].width == 64 and not warnings


@pytest.mark.parametrize("dash", ["—", "–", "―", "−", "——", "––", "-–", "‑‑", "－－"])
def test_a_dash_that_an_editor_corrected_begins_an_option(read, dash):
    prompts, warnings = read(
        f"a robot {dash}n bad, ugly {dash}w 64\n"
        f"{dash}prompt “a cat” {dash}negative_prompt “low quality” {dash}steps 5\n"
        f"a robot {dash} blue, {dash}hero\n"
        f"a b{dash}n c\n"
    )
    assert prompts == [
        Prompt("a robot", negative_prompt="bad, ugly", width=64),
        Prompt("a cat", negative_prompt="low quality", num_inference_steps=5),
        Prompt(f"a robot {dash} blue, {dash}hero"),
        Prompt(f"a b{dash}n c"),
    ]
    assert len(warnings) == 2
    assert warnings[0].endswith("line 1: its long dashes are read as --")


UNSUPPORTED = {
    "a cat BREAK a dog": "BREAK",
    "a cat AND a dog :0.5": "AND",
    "a [cat:dog:0.5]": "[cat:dog:0.5]",
    "a [dog:10] on grass": "[dog:10]",
    "a [dog::.5]": "[dog::.5]",
    "a [cat|dog]": "[cat|dog]",
    "a {red|blue} cat": "{red|blue}",
    "a {2$$red|blue|green} cat": "{2$$red|blue|green}",
    "{{masterpiece}}": "{masterpiece}",
    "a __color__ cat": "__color__",
    "a __art/style-2__ cat": "__art/style-2__",
    "embedding:easynegative, cat": "embedding:easynegative",
}


@pytest.mark.parametrize("prompt", UNSUPPORTED)
def test_syntax_that_is_not_understood_gets_a_line(caplog, prompt):
    with caplog.at_level("INFO"):
        load_prompts([prompt, prompt], None)
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith(f"{UNSUPPORTED[prompt]} in a prompt: ")
        assert line.endswith("is not supported, it is read as words")
        caplog.clear()
        load_prompts(["a cat"], None, negative_prompt=prompt)
        assert [record.getMessage() for record in caplog.records] == [line]


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat and a dog, break, Band, BREAKFAST",
        "(a cat:1.3), [dim], ((x)), a: b",
        r"\[a:0.5\], \{a\}",
        "snake_case__name, __init",
        "16:9, a|b",
    ],
)
def test_plain_words_and_weights_get_no_line(caplog, prompt):
    with caplog.at_level("INFO"):
        load_prompts([prompt], None)
    assert not caplog.records


def test_a_file_that_is_too_large(tmp_path):
    path = tmp_path / "large.txt"
    path.write_bytes(b"robot\n" * 700_000)
    with pytest.raises(UserError, match=r"large\.txt is larger than"):
        read_prompts(path)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no endless file here")
def test_an_endless_file_and_a_name_too_long():
    with pytest.raises(UserError, match="is larger than"):
        read_prompts(Path("/dev/zero"))
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(Path("a" * 300))


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no such mode")
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "secret.txt"
    path.touch(mode=0o000)
    with pytest.raises(UserError, match=r"--prompts_file .*secret\.txt cannot be read"):
        read_prompts(path)


def test_kohya_options_behind_the_text(read):
    line = "a cat, (hat:1.2) --n low quality, x --w 512 --h 768 --d 1 --l 7.5 --s 28"
    full = Prompt("a cat, (hat:1.2)", "low quality, x", 512, 768, 1, 7.5, 28)
    assert read(line) == ([full], [])
    assert read(re.sub("--.", lambda flag: flag[0].upper(), line)) == ([full], []), "in any case"
    assert read("a cat --S 3") == ([Prompt("a cat", num_inference_steps=3)], [])
    assert read("a cat --s 3 --s 4 --width 64") == (
        [Prompt("a cat", width=64, num_inference_steps=4)],
        [],
    )


def test_a1111_options_quoted_as_in_a_shell(read):
    line = (
        r'--prompt "a \"cat\", \(hat\)" --negative_prompt "low quality" --seed 1 --steps 20 '
        "--cfg_scale 7 --width 512 --height 768"
    )
    assert read(line) == ([Prompt(r'a "cat", \(hat\)', "low quality", 512, 768, 1, 7.0, 20)], [])
    assert read("--steps 2 --prompt a red robot --negative_prompt ''") == (
        [Prompt("a red robot", "", num_inference_steps=2)],
        [],
    )
    assert read("--prompt 'robot' --seed -1") == ([Prompt("robot")], []), (
        "any seed: the command line's"
    )


def test_the_three_kinds_in_one_file(read):
    prompts, remarks = read("# mine\na cat\na dog --d 5\n\n--prompt 'a robot' --seed 7\n")
    assert prompts == [Prompt("a cat"), Prompt("a dog", seed=5), Prompt("a robot", seed=7)]
    assert remarks == []


@pytest.mark.parametrize(
    "line", ["a robot -- blue", "a -- --", "-- blue", "well--known, x --2", "-n low", "a cat,--w 8"]
)
def test_dashes_that_begin_no_option_are_text(read, line):
    assert read(line) == ([Prompt(line)], [])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a --w 513", "--w 513 is not a multiple of 8: take 512"),
        ("a --h 99999", "--h '99999' is out of range: it must be at least 8, at most 8192"),
        ("a --d 1.5", "--d '1.5' is not a whole number"),
        ("a --l nan", "--l 'nan' is out of range"),
        ("a --s 0", "--s '0' is out of range"),
        ("a --d -2", "--d '-2' is out of range"),
        ("a --n --w 512", "--n has no value"),
        ("a --w", "--w has no value"),
        (
            "a --ar 16:9",
            "--ar is not an option of a prompt: remove it, or put a space after the dashes",
        ),
        ("a --wdth 512", "--wdth is not an option of a prompt: did you mean --width"),
        ("a cat --prompt b", "--prompt follows a text: begin the line with it"),
        ('--prompt "a cat', "a quote is not closed"),
        ("--prompt a\\", "a quote is not closed, or a \\ is the last character"),
        ("--prompt robot's hat", "a quote is not closed"),
        ("--prompt --seed 1", "--prompt has no value"),
        ("--prompt '' --seed 1", "it has no prompt"),
        ("--seed 5", "it has no prompt"),
        ("--prompt a --seed 5 6", "--seed '5 6' is not a whole number"),
        ("--prompt a --steps 9" + "9" * 5000, "--steps '9999"),
        ("a --" + "q" * 5000, "--qqq"),
    ],
)
def test_a_bad_line_is_reported_and_the_rest_is_generated(read, tmp_path, line, said):
    prompts, (remark,) = read(f"# first\na robot\n{line}\na cat --s 5")
    assert prompts == [Prompt("a robot"), Prompt("a cat", num_inference_steps=5)]
    assert (
        remark.startswith(f"line 3: {said}")
        and remark.endswith("; the line is skipped")
        and len(remark) < 400
    )
    with pytest.raises(
        UserError,
        match=r"prompts\.txt has no valid line: line 2: .*skipped \(and 1 more like it\)",
    ):
        read(f"\n{line}\n{line}")


def test_options_for_other_programs_are_reported_and_the_line_is_used(read):
    prompts, remarks = read(
        '--prompt "a cat" --sampler_name "Euler a" --seed 3 --batch_size 2\na dog --am 0.8 --s 9'
    )
    assert prompts == [Prompt("a cat", seed=3), Prompt("a dog", num_inference_steps=9)]
    assert remarks == [
        "line 1: --sampler_name, --batch_size ignored: no use here",
        "line 2: --am ignored: no use here",
    ]


words = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8).filter(
    lambda word: not word.startswith(("--", "#"))
)
sides = st.integers(1, 1024).map(lambda cells: cells * 8)
settings = st.fixed_dictionaries(
    {"text": st.lists(words, min_size=1, max_size=5).map(" ".join)},
    optional={
        "negative_prompt": st.lists(words, min_size=1, max_size=3).map(" ".join),
        "width": sides,
        "height": sides,
        "seed": st.integers(0, 2**63 - 1),
        "guidance_scale": st.floats(0, 100),
        "num_inference_steps": st.integers(1, 999),
    },
)
KOHYA = {
    "negative_prompt": "n",
    "width": "w",
    "height": "h",
    "seed": "d",
    "guidance_scale": "l",
    "num_inference_steps": "s",
}
A1111 = {
    "text": "prompt",
    "negative_prompt": "negative_prompt",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "guidance_scale": "cfg_scale",
    "num_inference_steps": "steps",
}


@given(
    st.lists(settings, min_size=1, max_size=4), st.sampled_from(["kohya", "a1111"]), st.randoms()
)
def test_lines_come_back_as_they_were_written(tmp_path_factory, wanted, kind, random):
    lines = []
    for fields in wanted:
        options = [
            (name, value) for name, value in fields.items() if kind == "a1111" or name != "text"
        ]
        random.shuffle(options)
        if kind == "kohya":
            lines.append(
                " ".join([fields["text"], *(f"--{KOHYA[name]} {value}" for name, value in options)])
            )
        else:
            lines.append(
                " ".join(f"--{A1111[name]} {shlex.quote(str(value))}" for name, value in options)
            )
    path = tmp_path_factory.getbasetemp() / "written_prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_prompts(path) == ([Prompt(**fields) for fields in wanted], [])


# What is no text at all, and what nearly is: marks, comments, line ends and control characters
# among letters.
PIECES = [
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xfe\xff",
    b"#",
    b" ",
    b"\t",
    b"\n",
    b"\r",
    b"\r\n",
    b"\0",
    b"\x1b",
    b"\x85",
    b"\xc2\x85",
    "\u2028".encode(),
    b"robot",
    b"--",
    b" --w",
    b" 64",
    b"--prompt ",
    b'"',
    b"'",
    b"\\",
    "洛克人".encode(),
    "é".encode("latin-1"),
    b"\xed\xa0\x80",
    "wide".encode("utf-16-le"),
    b"x" * 5000,
]
any_file = st.binary(max_size=200) | st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join)
any_file |= st.text(max_size=60).map(lambda text: text.encode("utf-16"))


@given(any_file)
def test_any_bytes_are_prompts_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any_prompts.txt"
    path.write_bytes(content)
    try:
        prompts, remarks = read_prompts(path)
    except UserError as error:
        assert "any_prompts.txt" in str(error) and "\n" not in str(error)
    else:
        assert prompts
        for text in [
            text for prompt in prompts for text in (prompt.text, prompt.negative_prompt) if text
        ]:
            assert text == " ".join(text.split()) and len(text.splitlines()) == 1
            assert not any(unicodedata.category(letter) == "Cc" for letter in text)
        assert all(len(remark.splitlines()) == 1 for remark in remarks)


@given(st.lists(st.text("abc, #é洛\t", max_size=12), max_size=8))
def test_every_line_that_is_no_comment_is_a_prompt(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "listed_prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    wanted = [" ".join(line.split()) for line in lines if line.strip() and line.strip()[0] != "#"]
    if wanted:
        assert texts(path) == wanted
    else:
        with pytest.raises(UserError):
            read_prompts(path)
