"""Printed commands can be pasted, into sh and into PowerShell."""

from __future__ import annotations

import os
import shlex
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaman import shell
from megaman.pages.gallery_command import command
from megaman.pages.gallery_images import GalleryImage


@pytest.mark.skipif(os.name != "posix", reason="Windows has no sh")
@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"))))
def test_sh_reads_the_words_back(words):
    assert shlex.split(shell.join(words)) == words


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        (r"C:\images\volto", r"C:\images\volto"),  # the Command Prompt takes it as well
        (r"C:\my images", r"'C:\my images'"),
        ("--seed=42", "--seed=42"),
        ("it's", "'it''s'"),
        ("\u2018so\u2019", "'\u2018\u2018so\u2019\u2019'"),
        ("0.5,1", "'0.5,1'"),  # two words to PowerShell
        ("$home; %PATH%", "'$home; %PATH%'"),
        ("@robots", "'@robots'"),
        ("洛克人", "'洛克人'"),
        ("", "''"),
    ],
)
def test_powershell_takes_a_word_as_it_is(monkeypatch, word, quoted):
    monkeypatch.setattr(shell, "os", SimpleNamespace(name="nt"))
    assert shell.quote(word) == quoted


def test_the_gallery_has_the_command_for_this_system(monkeypatch):
    image = GalleryImage("a.png", "it's a robot", "", seed=1, width=64, height=64, settings={})
    monkeypatch.setattr(shell, "os", SimpleNamespace(name="nt"))
    assert str(command(image)).startswith("python generate_megaman.py --prompts='it''s a robot' ")
