"""Runs of the two scripts as processes of their own, without the seconds that importing the
libraries takes each time.

Run as a program this is the process that has imported them: it reads orders, a line of JSON each,
and forks for each run. Where the start of a script is what is tested, conftest.py's run_script
starts Python itself.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from io import TextIOWrapper
from multiprocessing import util
from pathlib import Path
from typing import IO, cast

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARIES = [
    "accelerate",
    "torch.utils.tensorboard",
    "megaman.models.base",
    "megaman.data.latents",
    "megaman.data.encoding",
    "megaman.sampling.denoise",
]
# Modules that load what the scripts import in functions, and the scripts.
OURS = [
    "megaman.training.judge",
    "megaman.training.validation",
    "megaman.sampling.loading",
    "generate_megaman",
    "megaman_lora",
]


class Forks:
    """Starts runs in forks of one process, which is itself started when it is first needed."""

    def __init__(self):
        self._process: subprocess.Popen[str] | None = None

    def ask(self, order: dict) -> int | None:
        if self._process is None:
            variables = {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT)}
            variables["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # processes.py is too late
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                env=variables,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        stdin, stdout = _pipes(self._process)
        stdin.write(json.dumps(order) + "\n")
        stdin.flush()
        answer = stdout.readline()
        assert answer, "the process that forks has ended"
        return json.loads(answer)

    def start(
        self,
        args,
        cwd,
        patches: dict[str, object] | None = None,
        hub: dict[str, str] | None = None,
        env: dict[str, str] | None = None,
        pipe: Path | None = None,
    ) -> Fork:
        """Start one of the root's scripts: start(["megaman_lora.py", "--demo"], cwd), or
        start(["-c", code], cwd).

        In the fork alone patches are set, as in
        {"megaman.training.validation.NUM_INFERENCE_STEPS": 3}, and hub holds environment variables
        with which huggingface_hub is loaded again; None removes one. env holds variables that are
        read when the script runs, PYTHONIOENCODING among them, and pipe, a FIFO, takes both
        outputs.
        """
        script, *words = map(str, args)
        encoding = (env or {}).get("PYTHONIOENCODING", "utf-8")
        outputs = [_text_file(encoding), _text_file(encoding)]
        names = [str(pipe or file.name) for file in outputs]
        order = {
            "script": script.removesuffix(".py"),
            "words": words,
            "cwd": str(cwd),
            "outputs": names,
        }
        pid = self.ask(order | {"patches": patches or {}, "hub": hub or {}, "env": env or {}})
        assert pid is not None
        return Fork(self, pid, outputs)

    def run(self, args, cwd, patches=None, hub=None, env=None) -> subprocess.CompletedProcess[str]:
        process = self.start(args, cwd, patches, hub, env)
        said, errors = process.communicate()
        return subprocess.CompletedProcess(args, process.wait(), said, errors)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in _pipes(self._process):
                pipe.close()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


class Fork:
    """A run that was forked, as a subprocess.Popen."""

    def __init__(self, forks: Forks, pid: int, outputs: list):
        self._forks, self.pid, self._outputs = forks, pid, outputs
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._forks.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError("the run did not end in time")
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Wait for the end; what it wrote to stdout and to stderr."""
        self.wait(timeout)
        texts = []
        for file in self._outputs:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return texts[0], texts[1]


def _text_file(encoding: str):
    return tempfile.NamedTemporaryFile("w+", encoding=encoding, errors="replace")


def obey(order: dict) -> int:
    """In the fork: the script's main as it runs when it is started; returns the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in enumerate(order["outputs"], start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(order["cwd"])
    for name, value in order["patches"].items():
        module, _, attribute = name.rpartition(".")
        assert hasattr(sys.modules[module], attribute), name
        setattr(sys.modules[module], attribute, value)
    os.environ.update(order["env"])
    if encoding := order["env"].get("PYTHONIOENCODING"):  # which Python reads as it starts
        cast(TextIOWrapper, sys.stdout).reconfigure(encoding=encoding, errors="strict")
        cast(TextIOWrapper, sys.stderr).reconfigure(encoding=encoding, errors="backslashreplace")
    for name, value in order["hub"].items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    for name in [*sys.modules] if order["hub"] else []:
        if name.split(".")[0] == "huggingface_hub":
            del sys.modules[name]
    from megaman.errors import run_script

    try:
        if order["script"] == "-c":
            code, *words = order["words"]
            sys.argv = ["-c", *words]
            exec(code, {"__name__": "__main__"})
            return 0
        return run_script(sys.modules[order["script"]].main, order["words"])
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1


def end_multiprocessing() -> None:
    """What Python does at the end of a process: workers' semaphores are released."""
    getattr(util, "_exit_function")()  # noqa: B009 (it has no public name)


def serve() -> None:
    answers = os.dup(1)
    os.set_inheritable(answers, False)
    os.dup2(2, 1)
    sys.path.insert(0, str(ROOT))
    os.fsync = lambda fd: None  # as in conftest.py: nothing here outlasts a power cut
    gc.disable()  # nothing is freed while modules are loaded
    for library in [*LIBRARIES, *OURS]:  # with no work done yet that a fork could not take along
        importlib.import_module(library)
    gc.freeze()  # a collection in a fork would look at them all, and so copy their memory
    gc.enable()
    from megaman import runtime

    # In a fork this would copy the whole heap, for a run of a few steps.
    runtime.use_huge_pages = lambda: None
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            process, status = os.waitpid(order["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if process else None
        else:
            answer = os.fork()
            if answer == 0:
                code = 1
                try:
                    os.close(answers)
                    code = obey(order)
                except BaseException:
                    traceback.print_exc()
                finally:
                    end_multiprocessing()
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
        os.write(answers, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    serve()
