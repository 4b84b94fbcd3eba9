"""The base: from a folder, from the hub (a small one of our own), and one line for whatever is not
right with it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from megaman.errors import UserError
from megaman.hub import PROJECT
from megaman.models.base import Base, find_base, load_base
from megaman.models.configs import resolve_name
from megaman.models.typed import scheduler_config

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
WEIGHTS = [UNET, VAE, TEXT_ENCODER]
OLD_NAME, NEW_NAME = "runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture(scope="module")
def base(embedded_base) -> Base:
    return load_base(str(embedded_base), torch.float32)


@pytest.fixture
def own_copy(base_folder, tmp_path):
    """A base to break."""
    folder = tmp_path / "own-base"
    shutil.copytree(base_folder, folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def refusal(name: str | Path) -> str:
    """The one line with which a base is refused, before any of its weights is read."""
    with pytest.raises(UserError) as caught:
        load_base(str(name), torch.float32)
    line = str(caught.value)
    assert "\n" not in line and str(name) in line
    assert len(line) < 500 + len(str(name)) * 3
    return line


def test_the_parts_of_the_demo_base(base, embedded_base):
    assert base.name == str(embedded_base)
    for part in (base.unet, base.vae, base.text_encoder):
        assert part.dtype == torch.float32 and not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())
    assert base.unet.config.cross_attention_dim == base.text_encoder.config.hidden_size
    assert base.noise_scheduler.config.prediction_type == "epsilon"
    ids = base.tokenizer("a robot", padding="max_length", return_tensors="pt").input_ids
    assert base.text_encoder(ids)[0].shape == (
        1,
        base.tokenizer.model_max_length,
        base.unet.config.cross_attention_dim,
    )


def test_sizes_are_read_from_the_base(base):
    pixels = torch.zeros(1, 3, base.native_size, base.native_size)
    latents = base.vae.encode(pixels).latent_dist.mean
    assert latents.shape == (
        1,
        base.unet.config.in_channels,
        base.unet.config.sample_size,
        base.unet.config.sample_size,
    )
    assert base.native_size == base.vae_scale_factor * latents.shape[-1]


def test_half_precision_spares_the_vae(base_folder):
    base = load_base(str(base_folder), torch.float16)
    assert (base.unet.dtype, base.text_encoder.dtype, base.vae.dtype) == (
        torch.float16,
        torch.float16,
        torch.float32,
    )


def test_the_weights_are_the_files(base, embedded_base):
    from safetensors.torch import load_file

    for part, file in ((base.unet, UNET), (base.vae, VAE)):
        wanted = load_file(embedded_base / file)
        found = part.state_dict()
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[key], wanted[key].float()) for key in wanted)


def test_files_of_the_fp16_variant_are_taken_where_there_are_no_others(own_copy):
    for name in WEIGHTS:
        (own_copy / name).rename(own_copy / name.replace(".safetensors", ".fp16.safetensors"))
    assert load_base(str(own_copy), torch.float32).unet.dtype == torch.float32
    assert load_base(str(own_copy), torch.float16).unet.dtype == torch.float16


def test_a_folder_of_the_project_is_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        find_base("megaman/pages/templates", half=False)
        == PROJECT / "megaman" / "pages" / "templates"
    )
    own = tmp_path / "megaman" / "pages" / "templates"
    own.mkdir(parents=True)
    assert find_base("megaman/pages/templates", half=False).resolve() == own, (
        "one's own comes first"
    )


def test_the_name_that_is_noted_holds_elsewhere(base_folder, tmp_path, monkeypatch):
    assert resolve_name(OLD_NAME) == NEW_NAME
    assert resolve_name("someone/model") == "someone/model"
    assert (
        resolve_name(str(PROJECT / "megaman" / "pages" / "templates")) == "megaman/pages/templates"
    )
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_name("mine") == resolve_name("./mine") == str((tmp_path / "mine").resolve())
    assert find_base(resolve_name(str(base_folder)), half=False).samefile(base_folder)


@pytest.mark.parametrize(
    "name", ["./nowhere", "../nowhere", "nowhere", "a/b/c", "~/no/where", "~nobody-here/x", "a b/c"]
)
def test_a_folder_that_is_not_there(name):
    line = refusal(name)
    assert "neither a folder on this machine nor a name on the hub" in line
    assert "Name a folder" in line and "--demo" in line


def test_an_absolute_folder_that_is_not_there(tmp_path):
    assert "neither a folder on this machine" in refusal(tmp_path / "nowhere")


def test_a_name_on_the_hub_without_a_network():
    """conftest.py switches the hub off in this process."""
    line = refusal("someone/some-model")
    assert "not on this machine" in line and "Name a folder" in line and "--demo" in line
    with pytest.raises(UserError, match=NEW_NAME):
        find_base(OLD_NAME, half=False)


def test_a_folder_that_is_no_base(tmp_path):
    assert "holds no model_index.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    "kind", ["StableDiffusionXLPipeline", "StableDiffusionInpaintPipeline", "FluxPipeline", None]
)
def test_another_kind_of_model(own_copy, kind):
    index = json.loads((own_copy / "model_index.json").read_text())
    (own_copy / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
    assert f"is a {kind}, not a Stable Diffusion 1.x" in refusal(own_copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_broken_index(own_copy, content):
    (own_copy / "model_index.json").write_text(content)
    assert "model_index.json" in refusal(own_copy) or "not a Stable Diffusion 1.x" in refusal(
        own_copy
    )


@pytest.mark.parametrize("name", WEIGHTS)
def test_pickles_are_refused(own_copy, name):
    (own_copy / name).rename(own_copy / name.replace(".safetensors", ".bin"))
    line = refusal(own_copy)
    assert f"{Path(name).parent}/ holds only .bin files, pickles" in line and ".safetensors" in line


@pytest.mark.parametrize(
    "name",
    ["v1-5-pruned.ckpt", "./v1-5-pruned.ckpt", "model.bin", "model.pt", "MODEL.PTH", "a.pkl"],
)
@pytest.mark.parametrize("there", [True, False])
def test_a_single_pickle_is_refused(tmp_path, monkeypatch, name, there):
    monkeypatch.chdir(tmp_path)
    if there:
        Path(name).touch()
    assert "is a pickle, which can run code. Convert it to safetensors" in refusal(name)


@pytest.mark.parametrize("name", WEIGHTS)
def test_missing_weights_are_named(own_copy, name):
    (own_copy / name).unlink()
    assert f"{name} is missing" in refusal(own_copy)


@pytest.mark.parametrize("length", [0, 4, 1000, 200_000])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_cut_short(own_copy, name, length):
    """As a download that was interrupted leaves them."""
    with open(own_copy / name, "rb+") as file:
        file.truncate(length)
    assert "cannot be loaded" in refusal(own_copy)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
    ],
)
def test_an_incomplete_base_says_what_is_missing(own_copy, name):
    path = own_copy / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert f"incomplete: {name} is missing" in refusal(own_copy)


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_broken_configuration(own_copy, name):
    (own_copy / name).write_text("{")
    line = refusal(own_copy)
    assert "cannot be loaded" in line or f"{name} is not valid JSON" in line


def changed(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_models_that_would_train_wrong(own_copy):
    changed(own_copy / "scheduler" / "scheduler_config.json", prediction_type="sample")
    assert "predicts sample" in refusal(own_copy)
    changed(own_copy / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    scheduler = load_base(str(own_copy), torch.float32).noise_scheduler
    assert scheduler_config(scheduler).prediction_type == "v_prediction"
    changed(own_copy / "unet" / "config.json", in_channels=9)
    assert "cannot be loaded" in refusal(own_copy), "weights for four channels"


def test_a_model_for_inpainting(own_copy):
    """Nine input channels, in the weights too."""
    from safetensors.torch import load_file, save_file

    changed(own_copy / "unet" / "config.json", in_channels=9)
    tensors = load_file(own_copy / UNET)
    first = tensors["conv_in.weight"]
    tensors["conv_in.weight"] = torch.zeros(first.shape[0], 9, *first.shape[2:], dtype=first.dtype)
    save_file(tensors, own_copy / UNET)
    assert "inpainting" in refusal(own_copy) and "9 input channels" in refusal(own_copy)


# The hub: what huggingface_hub asks of it, answered from folders on this machine.

COMMIT = "0123456789" * 4


class HubServer(ThreadingHTTPServer):
    """Serves repositories by name from their folders, and records the files that were fetched."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), SmallHub)
        self.repositories: dict[str, Path] = {}
        self.fetched: list[str] = []
        self.closing = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        self.closing.set()
        with contextlib.suppress(OSError):
            self.shutdown()
        self.server_close()
        self._thread.join()


class SmallHub(BaseHTTPRequestHandler):
    """The part of the hub's API that downloads need."""

    server: HubServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "/someone/silent" in path:
            self.server.closing.wait(60)
            self.close_connection = True
        elif "/someone/broken" in path:
            self.close_connection = True  # no answer at all
        elif "/someone/portal" in path:
            self.answer(
                b"<html>Please log in to this network</html>", {"Content-Type": "text/html"}
            )
        elif "/someone/error" in path:
            self.answer(b"", {}, 500)
        elif "/someone/gated" in path:
            self.answer(b"", {"X-Error-Code": "GatedRepo"}, 401)
        else:
            self.serve(path)

    def serve(self, path: str) -> None:
        for name, folder in self.server.repositories.items():
            if path == f"/api/models/{name}/tree/{COMMIT}":
                files = [file for file in folder.rglob("*") if file.is_file()]
                listed = [
                    {
                        "type": "file",
                        "path": file.relative_to(folder).as_posix(),
                        "size": file.stat().st_size,
                        "oid": self.digest(file),
                    }
                    for file in files
                ]
                return self.answer(json.dumps(listed).encode())
            if path == f"/api/models/{name}/revision/main":
                return self.answer(json.dumps({"id": name, "sha": COMMIT}).encode())
            file = folder / path.removeprefix(f"/{name}/resolve/{COMMIT}/")
            if path.startswith(f"/{name}/resolve/{COMMIT}/") and file.is_file():
                if self.command == "GET":
                    self.server.fetched.append(f"{name}: {file.relative_to(folder).as_posix()}")
                return self.answer(
                    file.read_bytes(), {"ETag": f'"{self.digest(file)}"', "X-Repo-Commit": COMMIT}
                )
        return self.answer(b"", {"X-Error-Code": "RepoNotFound"}, 404)

    @staticmethod
    def digest(file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def answer(self, content: bytes, headers=None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub():
    server = HubServer()
    yield server
    server.stop()


ASK_FOR_BASES = """
import json, sys, torch
import megaman.models.base
import megaman.hub
from megaman.errors import UserError

megaman.hub.HUB_TIMEOUT = 1
results = []
for how, name in json.loads(sys.argv[1]):
    try:
        if how == "load":
            results.append(megaman.models.base.load_base(name, torch.float32).native_size)
        else:
            folder = megaman.models.base.find_base(name, half=how == "half")
            files = [file for file in folder.rglob("*") if file.is_file()]
            results.append(sorted(file.relative_to(folder).as_posix() for file in files))
    except UserError as error:
        results.append(f"UserError: {error}")
print(json.dumps(results))
"""


@pytest.fixture
def ask(forked, tmp_path):
    """Load or find bases in a process of its own, whose hub is at the endpoint and whose cache is
    in tmp_path."""

    def asked(endpoint: str, *bases: tuple[str, str]) -> list:
        variables = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": None,
            "NO_PROXY": "127.0.0.1",
            "HF_TOKEN": None,
        }
        done = forked.run(["-c", ASK_FOR_BASES, json.dumps(bases)], tmp_path, hub=variables)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return json.loads(done.stdout)

    return asked


def at(hub) -> str:
    return f"http://127.0.0.1:{hub.server_address[1]}"


def test_a_base_on_the_hub_is_fetched_once(hub, ask, base, own_copy):
    for extra in (
        "unet/diffusion_pytorch_model.bin",
        "safety_checker/model.safetensors",
        "v1-5.ckpt",
        "README.md",
    ):
        (own_copy / extra).parent.mkdir(exist_ok=True)
        (own_copy / extra).write_text("not needed")
    hub.repositories["someone/demo-base"] = own_copy
    assert (
        ask(at(hub), ("load", "someone/demo-base"), ("load", "someone/demo-base"))
        == [base.native_size] * 2
    )
    files = {line.removeprefix("someone/demo-base: ") for line in hub.fetched}
    assert len(files) == len(hub.fetched), "each file once"
    assert set(WEIGHTS) < files
    assert not {file for file in files if not file.endswith((".json", ".safetensors"))}, (
        "no pickles, no readme"
    )
    assert "safety_checker/model.safetensors" not in files
    hub.stop()
    assert ask(at(hub), ("load", "someone/demo-base")) == [base.native_size], (
        "from the cache, the hub being away"
    )


def test_the_smaller_files_are_fetched_where_they_will_do(hub, ask, tmp_path):
    names = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
    ]
    lean = [name.replace(".safetensors", ".fp16.safetensors") for name in WEIGHTS]
    for repository, weights in (
        ("both", WEIGHTS + lean),
        ("full", WEIGHTS),
        (NEW_NAME, WEIGHTS + lean),
    ):
        folder = tmp_path / "served" / repository
        for name in names + weights:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{repository} {name}")
        hub.repositories[repository if "/" in repository else f"someone/{repository}"] = folder
    found = ask(at(hub), ("half", "someone/both"), ("half", "someone/full"), ("whole", OLD_NAME))
    assert found == [sorted(names + lean), sorted(names + WEIGHTS), sorted(names + WEIGHTS)]
    assert {line.split(":")[0] for line in hub.fetched} == {
        "someone/both",
        "someone/full",
        NEW_NAME,
    }


def test_what_the_hub_does_not_give_ends_in_one_line(hub, ask, tmp_path):
    ways = ["none", "gated", "error", "portal", "broken", "silent"]
    lines = dict(
        zip(ways, ask(at(hub), *[("load", f"someone/{way}") for way in ways]), strict=True)
    )
    for way, line in lines.items():
        assert line.startswith("UserError: ") and "\n" not in line
        assert f"someone/{way}" in line
        assert "Name a folder" in line and "--demo" in line, "the two ways on"
    for way in ("none", "gated"):
        assert f"The hub has no model someone/{way}, or it needs a login" in lines[way]
    for way in ("error", "portal", "broken", "silent"):
        assert "cannot be downloaded" in lines[way]


def test_no_hub_at_all_ends_in_one_line(ask):
    (line,) = ask("http://127.0.0.1:9", ("load", "someone/some-base"))
    assert line.startswith("UserError: The base someone/some-base is not on this machine")
    assert "\n" not in line and "Name a folder" in line and "--demo" in line
