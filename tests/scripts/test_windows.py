"""What is different on Windows, forced here: a cp1252 console, spawned workers, files without an
encoding."""

from __future__ import annotations

import ast
import os
from typing import Any

import pytest
from conftest import FEW_SAMPLING_STEPS, ROOT

SOURCES = sorted(
    [*ROOT.glob("*.py"), *(ROOT / "megaman").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
)


def opens_text(call: Any) -> bool:
    """Whether a call opens a file as text, judged by its name and mode."""
    function = call.func
    name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", None)
    # Of Pillow, the system, megaman.files and megaman.training.
    others = (
        "Image.open",
        "os.open",
        "webbrowser.open",
        "write_text",
        "OutputFolder.open",
        "Run.open",
    )
    if ast.unparse(function) in others:
        return False
    if name not in ("open", "fdopen"):
        return name in ("read_text", "write_text")
    is_method = isinstance(function, ast.Attribute) and name == "open"
    position = 0 if is_method else 1  # the mode is a Path's first argument, open's second
    modes = [
        *call.args[position:][:1],
        *(keyword.value for keyword in call.keywords if keyword.arg == "mode"),
    ]
    return not any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_text_file_is_opened_in_utf_8(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and opens_text(node)]
    for call in calls:
        encodings = [
            ast.literal_eval(keyword.value)
            for keyword in call.keywords
            if keyword.arg == "encoding"
        ]
        assert encodings in (["utf-8"], ["utf-8-sig"]), (
            f"{path.name}:{call.lineno}: {ast.unparse(call)}"
        )


def test_the_test_above_sees_what_it_is_for():
    wrong = [
        "open(x)",
        "open(x, 'w')",
        "p.read_text()",
        "p.write_text(t)",
        "p.open('a')",
        "os.fdopen(n)",
    ]
    right = [
        "open(x, 'rb')",
        "open(x, mode='wb')",
        "p.open('rb')",
        "Image.open(x)",
        "write_text(p, t)",
    ]
    calls = [ast.parse(code, mode="eval").body for code in wrong + right]
    assert [opens_text(call) for call in calls] == [True] * 6 + [False] * 5


UNIX_MODULES = {"fcntl", "grp", "pty", "pwd", "readline", "resource", "termios", "tty"}
# What os and signal have on Unix alone, as far as it is of use here.
UNIX_NAMES = {"fork", "geteuid", "getuid", "killpg", "mkfifo", "register_at_fork", "seteuid"}
UNIX_NAMES |= {"SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGSTOP", "SIGUSR1", "pthread_kill"}
# conftest.py imports browser.py on Unix alone.
TESTS = sorted({*(ROOT / "tests").rglob("*.py")} - {ROOT / "tests" / "helpers" / "browser.py"})


def unix_only(source: str) -> list[str]:
    """What a module asks of Unix as it is imported, outside functions and conditions."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            for decorator in getattr(node, "decorator_list", ()):
                visit(decorator)
            return
        if isinstance(node, (ast.If, ast.IfExp)):
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names if alias.name in UNIX_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in UNIX_MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Attribute) and node.attr in UNIX_NAMES:
            if ast.unparse(node.value) in ("os", "signal"):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.BoolOp):  # hasattr(os, "geteuid") and os.geteuid() == 0
            visit(node.values[0])
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda path: path.name)
def test_nothing_of_unix_is_needed_to_import_a_module(path):
    """Else Windows collects no test at all."""
    assert unix_only(path.read_text(encoding="utf-8")) == []


def test_what_only_unix_has_is_seen():
    wrong = {
        "import os, resource": ["resource"],
        "from fcntl import flock": ["fcntl"],
        "@pytest.mark.parametrize('number', [signal.SIGHUP])\ndef test(number): ...": [
            "signal.SIGHUP"
        ],
    }
    assert {source: unix_only(source) for source in wrong} == wrong
    right = ["def end():\n    os.killpg(1, signal.SIGKILL)", "if posix:\n    import fcntl"]
    right.append("CAN = hasattr(os, 'geteuid') and os.geteuid() == 0")
    assert not any(map(unix_only, right))


NAME = "Größe 洛克 🤖"
PROMPT = "ein blauer Röboter, 洛克人 🤖"
FORCE_SPAWN = """
import atexit, multiprocessing, pathlib, sys
multiprocessing.set_start_method("spawn")
if any("spawn_main" in word for word in sys.orig_argv):
    file = pathlib.Path(__file__).with_name("spawned")
    atexit.register(lambda: file.write_text(" ".join(sys.modules)))
"""
ON_CP1252 = """
import io, os, sys
import generate_megaman
from megaman.errors import run_script
for name, number in (("stdout", 1), ("stderr", 2)):
    setattr(sys, name, io.TextIOWrapper(os.fdopen(number, "wb"), "cp1252"))
code = run_script(generate_megaman.main, sys.argv[1:])
sys.stdout.flush()
sys.exit(code)
"""
SPAWNING = """
import multiprocessing, sys
import megaman_lora
from megaman.errors import run_script
multiprocessing.set_start_method("spawn", force=True)
sys.exit(run_script(megaman_lora.main, sys.argv[1:]))
"""
CP1252 = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}


def test_both_scripts_on_a_console_of_windows(forked, base_folder, pictures, tmp_path):
    """Paths and prompts that cp1252 cannot show; and the worker that decodes images is spawned, as
    on Windows."""
    (tmp_path / "forced").mkdir()
    (tmp_path / "forced" / "sitecustomize.py").write_text(FORCE_SPAWN, encoding="utf-8")
    env = {**CP1252, "PYTHONPATH": os.pathsep.join([str(tmp_path / "forced"), str(ROOT)])}
    data_dir = pictures.rename(tmp_path / f"Bilder {NAME}")
    next(data_dir.glob("*.png")).rename(data_dir / f"{NAME}.png")
    (data_dir / f"kaputt {NAME}.png").write_bytes(b"no picture")
    flags = [
        "--pretrained_model_name",
        base_folder,
        "--data_dir",
        data_dir,
        "--output_dir",
        f"aus/{NAME}",
        "--resolution",
        32,
        "--max_train_steps",
        1,
        "--num_validation_images",
        1,
        "--lora_rank",
        1,
        "--dataloader_num_workers",
        1,
        "--target_modules",
        "to_q",
    ]
    words = ["-c", SPAWNING, *flags, "--validation_prompt", PROMPT]
    done = forked.run(words, tmp_path, FEW_SAMPLING_STEPS, env=env)
    assert done.returncode == 0, done.stderr
    loaded = (tmp_path / "forced" / "spawned").read_text().split()  # as Windows begins a worker
    assert "torch.utils.data" in loaded and not {"diffusers", "peft"} & {*loaded}
    assert "\\u6d1b" in done.stdout, "shown as far as cp1252 goes"
    (log_dir,) = (tmp_path / "logs").iterdir()
    assert log_dir.name.startswith(f"{NAME}-")

    prompts = tmp_path / f"{NAME}.txt"
    prompts.write_text(f"{PROMPT}\n", encoding="utf-8")
    flags = [
        "--lora_path",
        f"aus/{NAME}/lora_weights",
        "--output_dir",
        f"bilder/{NAME}",
        "--prompts_file",
        prompts,
        "--num_inference_steps",
        2,
        "--height",
        64,
        "--width",
        64,
    ]
    done = forked.run(["-c", ON_CP1252, *flags], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\\u6d1b" in done.stdout
    assert PROMPT in (tmp_path / "bilder" / NAME / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", ["megaman_lora.py", "generate_megaman.py"])
def test_help_and_mistakes_on_a_console_of_windows(run_script, tmp_path, script):
    done = run_script([script, "--help"], tmp_path, CP1252)
    assert done.returncode == 0 and "usage:" in done.stdout and done.stderr == ""
    done = run_script([script, f"--{NAME[:5]}洛", "--seed", NAME], tmp_path, CP1252)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 2 and "\\u6d1b" in done.stderr
    folder = {"megaman_lora.py": "--data_dir", "generate_megaman.py": "--prompts_file"}[script]
    done = run_script([script, folder, NAME], tmp_path, CP1252)
    assert done.returncode == 1 and "\\u6d1b" in done.stderr and len(done.stderr.splitlines()) == 1
