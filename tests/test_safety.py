"""A file from a stranger can do nothing but be read: no pickle, no lying header, nothing fetched or
imported."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import re
import shutil
import struct
from itertools import chain
from pathlib import Path

import hypothesis
import pytest
import torch
from conftest import ROOT
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file

from megaman import safe_loading
from megaman.errors import UserError
from megaman.lora import adapter, peft_config, saving
from megaman.lora import files as lora_files
from megaman.lora.formats import PEFT_PREFIX
from megaman.models.base import load_base
from megaman.models.weights import build
from megaman.training import checkpoint, optimizer_state, output
from megaman.training.adapters import Adapters

SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "megaman").rglob("*.py")])
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0, 4), "c": torch.tensor(1.5)}


def one_line(error: pytest.ExceptionInfo) -> str:
    line = str(error.value)
    assert len(line.splitlines()) == 1 and line.isprintable() and len(line) < 1000
    return line


def with_header(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = {
    "plain": save(TENSORS, {"format": "pt", "ss_x": "洛克人"}),
    "no tensors": with_header({}),
    "padded": with_header(json.dumps({"a": entry()}).encode() + b"   ", bytes(8)),
    "640 bytes": with_header(
        json.dumps({"a": entry()}).encode().ljust(640), bytes(8)
    ),  # begins as a pickle does
    "scalar": with_header({"a": entry(shape=[], offsets=[0, 4])}, bytes(4)),
}
EIGHT = bytes(8)
LYING = {
    "empty": b"",
    "seven bytes": bytes(7),
    "longer than the file": with_header({}, length=1000),
    "a billion bytes": with_header({}, length=10**9),
    "2**64 - 1 bytes": with_header({}, length=2**64 - 1),
    "a header of length 0": bytes(8),
    "no JSON": with_header(b"{'a'"),
    "no UTF-8": with_header(b'{"\xff": 1}'),
    "a list": with_header([entry()], EIGHT),
    "a number": with_header(5),
    "NaN": with_header(b'{"__metadata__": {"a": NaN}}'),
    "nested deep": with_header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "lists nested deep": with_header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "doubles": with_header(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), EIGHT),
    "doubles in metadata": with_header(b'{"__metadata__": {"x": "1", "x": "2"}}'),
    "metadata of numbers": with_header({"__metadata__": {"x": 1}}),
    "metadata a list": with_header({"__metadata__": ["x"]}),
    "entry a list": with_header({"a": [1, 2]}),
    "a key too many": with_header({"a": {**entry(), "code": "x"}}, EIGHT),
    "a key too few": with_header({"a": {"dtype": "F32", "shape": [2]}}, EIGHT),
    "unknown dtype": with_header({"a": entry("F31")}, EIGHT),
    "dtype a list": with_header({"a": entry(["F32"])}, EIGHT),
    "negative shape": with_header({"a": entry(shape=[-1, -2])}, EIGHT),
    "shape true": with_header({"a": entry(shape=[True, 2])}, EIGHT),
    "shape of floats": with_header({"a": entry(shape=[2.0])}, EIGHT),
    "huge shape": with_header({"a": entry(shape=[2**62, 2**62])}, EIGHT),
    "5000 digits": with_header(
        b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 5000), EIGHT
    ),
    "a thousand dimensions": with_header({"a": entry(shape=[1] * 1000, offsets=[0, 4])}, bytes(4)),
    "not the shape's bytes": with_header({"a": entry(shape=[3])}, EIGHT),
    "beyond the end": with_header({"a": entry()}, bytes(4)),
    "too much data": with_header({"a": entry()}, bytes(9)),
    "negative offset": with_header({"a": entry(offsets=[-8, 0])}, EIGHT),
    "backwards": with_header({"a": entry(offsets=[8, 0])}, EIGHT),
    "three offsets": with_header({"a": entry(offsets=[0, 8, 8])}, EIGHT),
    "overlapping": with_header({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
    "the same place": with_header({"a": entry(), "b": entry()}, EIGHT),
    "a gap": with_header({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_sound_header_passes(tmp_path, name):
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD[name])
    safe_loading.check_safetensors(path)
    load_file(path)


@pytest.mark.parametrize("name", LYING)
def test_a_lying_header_is_refused_in_one_line(tmp_path, name):
    path = tmp_path / "a.safetensors"
    path.write_bytes(LYING[name])
    with pytest.raises(UserError) as error:
        safe_loading.check_safetensors(path)
    assert str(path) in one_line(error) and "cannot be loaded" in one_line(error)


json_value = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "U8"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
odd_entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "C64", "U32"])
        | json_value,
        "shape": st.lists(st.integers(-1, 4) | st.just(2**40), max_size=3) | json_value,
        "data_offsets": st.lists(
            st.sampled_from([0, 4, 8, 12, 16, 24, 2**64]), min_size=2, max_size=2
        )
        | json_value,
    },
)
odd_table = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]), odd_entry | json_value, max_size=3
)
odd_header = (odd_table | json_value).map(lambda value: json.dumps(value).encode()) | st.binary(
    max_size=60
)
odd_length = st.none() | st.integers(0, 200) | st.integers(0, 2**64 - 1)


def changed(content: bytes, changes: list[tuple[int, int]]) -> bytes:
    """A file with some of its bytes changed; the first ones most of all."""
    bad = bytearray(content)
    for place, byte in changes:
        bad[place % len(bad)] = byte
    return bytes(bad)


odd_file = st.builds(with_header, odd_header, st.binary(max_size=24), odd_length) | st.builds(
    changed,
    st.sampled_from(list(GOOD.values())),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=4),
)


@given(odd_file)
def test_any_file_is_refused_in_one_line_or_sound(tmp_path_factory, content):
    """What passes the check is read by the library, whole; nothing else ever comes to it."""
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    try:
        safe_loading.check_safetensors(path)
    except UserError as error:
        assert "any.safetensors" in str(error) and len(str(error).splitlines()) == 1
    else:
        assert sum(tensor.nbytes for tensor in load(content).values()) == len(
            content
        ) - 8 - int.from_bytes(content[:8], "little")


# Pickles.


class Bomb:
    """Unpickling it leaves a file: proof that something loaded it."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def pickles(bomb: Bomb, folder: Path) -> dict[str, bytes]:
    torch.save(bomb, folder / "zip", _use_new_zipfile_serialization=True)
    torch.save(bomb, folder / "old", _use_new_zipfile_serialization=False)
    contents = {name: (folder / name).read_bytes() for name in ("zip", "old")}
    return contents | {f"protocol {n}": pickle.dumps(bomb, protocol=n) for n in (0, 2, 3, 4, 5)}


@pytest.fixture(scope="module")
def plain_lora(base_folder, tmp_path_factory):
    """A LoRA's folder as PEFT has it, to be broken."""
    unet = UNet2DConditionModel.from_pretrained(base_folder / "unet", dtype=torch.float32)
    adapter.inject(unet, 2, 4, ["to_q", "conv_in"])
    folder = tmp_path_factory.mktemp("plain") / "lora"
    folder.mkdir()
    saving.write_peft(folder, {"unet": unet}, "some/base")
    return folder


@pytest.fixture
def own_lora(plain_lora, tmp_path):
    return shutil.copytree(plain_lora, tmp_path / "lora")


@pytest.fixture(scope="module")
def unet_shape(base_folder):
    """The UNet without its numbers, for what is refused before it is touched."""
    return build(UNet2DConditionModel, UNet2DConditionModel.load_config(base_folder / "unet"))


def fresh(base_folder) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(base_folder / "unet", dtype=torch.float32)


def lora_refusal(folder: Path, unet) -> str:
    with pytest.raises(UserError) as error:
        lora_files.load_lora(folder, unet)
    assert str(folder) in one_line(error)
    return one_line(error)


def test_a_pickle_under_another_name_is_refused(own_lora, unet_shape, tmp_path):
    mark = tmp_path / "ran"
    for name, content in pickles(Bomb(mark), tmp_path).items():
        (own_lora / lora_files.PEFT_WEIGHTS).write_bytes(content)
        line = lora_refusal(own_lora, unet_shape)
        assert ("is a pickle whatever its name says" in line) == (name != "protocol 0"), line
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pth", ".pkl"])
def test_a_folder_with_a_pickle_says_how_to_convert(own_lora, unet_shape, monkeypatch, suffix):
    weights = own_lora / lora_files.PEFT_WEIGHTS
    pickled = weights.with_suffix(suffix)
    torch.save(load_file(weights), pickled)
    weights.unlink()
    line = lora_refusal(own_lora, unet_shape)
    assert f"{pickled} is a pickle, which can run code" in line
    code = line.split('python -c "')[1].split('"')[0]
    if suffix == ".bin":  # what the line says is what one has to do
        monkeypatch.chdir(own_lora)
        exec(code, {})
        assert weights.is_file()


def test_a_file_in_place_of_a_folder(tmp_path, unet_shape, plain_lora):
    pickled = tmp_path / "style.PT"
    pickled.write_bytes(b"anything")
    assert "is a pickle" in lora_refusal(pickled, unet_shape) and "save_file" in lora_refusal(
        pickled, unet_shape
    )
    hidden = tmp_path / "style.safetensors"
    torch.save({}, hidden)
    assert "is a pickle" in lora_refusal(hidden, unet_shape)
    alone = tmp_path / "alone" / lora_files.PEFT_WEIGHTS
    alone.parent.mkdir()
    shutil.copy(plain_lora / lora_files.PEFT_WEIGHTS, alone)
    assert "without its adapter_config.json" in lora_refusal(alone, unet_shape)
    assert peft_config.find(plain_lora / lora_files.PEFT_WEIGHTS) == plain_lora
    other = tmp_path / "notes.txt"
    other.write_text("no LoRA")
    assert "not a .safetensors" in lora_refusal(other, unet_shape)


def test_a_base_that_is_a_pickle_whatever_its_name(tmp_path):
    hidden = tmp_path / "model.safetensors"
    torch.save({}, hidden)
    with pytest.raises(
        UserError, match=r"is a pickle, which can run code.*convert_original_stable_diffusion"
    ):
        load_base(str(hidden), torch.float32)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_in_the_sources_loads_pickles_or_foreign_code(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {ast.unparse(call.func) for call in calls}
    if path.name == "import_probe.py":  # for --system_info, in a process of its own
        called.remove("importlib.import_module")
    assert not called & {
        "torch.load",
        "pickle.load",
        "pickle.loads",
        "eval",
        "exec",
        "__import__",
        "importlib.import_module",
    }
    keywords = chain.from_iterable(call.keywords for call in calls)
    assert not {"trust_remote_code", "weights_only"} & {keyword.arg for keyword in keywords}
    loads = [call for call in calls if ast.unparse(call.func).endswith(".from_pretrained")]
    assert all(
        "PeftModel" not in ast.unparse(call.func) and "PeftConfig" not in ast.unparse(call.func)
        for call in loads
    )


# A LoRA from a stranger.


def set_config(folder: Path, **values) -> None:
    path = folder / peft_config.PEFT_CONFIG
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("r", value) for value in (0, -1, 3, 10**9, 10**400, 2.5, True, "2", None, [2], {})],
        *[
            ("lora_alpha", value)
            for value in (float("nan"), float("inf"), 10**400, 0, -4, "4", None, True, [[[4]]])
        ],
        *[
            ("alpha_pattern", value)
            for value in ({"(a+)+": 2}, {"to_q": float("nan")}, {"to_q": None}, 5)
        ],
        *[("peft_type", value) for value in ("ADALORA", "evil.module", None, 5, ["LORA"])],
        *[("use_rslora", value) for value in ("yes", 1, None)],
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_odd_configuration_is_refused_by_its_key(own_lora, unet_shape, key, value):
    set_config(own_lora, **{key: value})
    refusal = lora_refusal(own_lora, unet_shape)
    assert f"adapter_config.json: {key} is not" in refusal
    assert "(a+)+" not in str(value) or "'(a+)+' is a regular expression" in refusal


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 2.0),
        *[
            ("target_modules", value)
            for value in (".*", "all-linear", r".*attn\d\.to_[qk]", "(a+)+$", "[", [], None, [""])
        ],
        *[
            ("target_modules", value)
            for value in ([1], ["(a+)+$"], {"to_q": 1}, ["to_q"] * 3000, ["x" * 300])
        ],
        *[
            ("rank_pattern", value)
            for value in ({"(a+)+": 2}, {"[": 9}, {"to_q": "2"}, [2], "x", {"to_q": [2]})
        ],
    ],
    ids=lambda value: str(value)[:30],
)
def test_ranks_and_targets_are_those_of_the_tensors(own_lora, base_folder, monkeypatch, key, value):
    """Whatever the configuration says of them; a pattern in it is never compiled."""

    def loaded() -> dict[str, torch.Tensor]:
        unet = fresh(base_folder)
        lora_files.load_lora(own_lora, unet)
        return saving.adapter_state(unet)

    before = loaded()
    set_config(own_lora, **{key: value})
    compiled = []
    for name in ("compile", "match", "fullmatch", "search"):
        function = getattr(re, name)
        monkeypatch.setattr(
            re, name, lambda p, *a, f=function, **k: compiled.append(p) or f(p, *a, **k)
        )
    after = loaded()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    patterns = [value] if isinstance(value, str | float | None) else list(value)
    assert not set(patterns) - {"to_q"} & set(compiled)


@pytest.mark.parametrize(
    ("kind", "said"), [("LOHA", "'LOHA'"), ("IA3", "'IA3'"), ("x" * 99, f"'{'x' * 30}'")]
)
def test_another_adapter_is_refused_by_its_type(own_lora, unet_shape, kind, said):
    set_config(own_lora, peft_type=kind)
    assert f"peft_type is not LORA but {said}" in lora_refusal(own_lora, unet_shape)


def test_nothing_that_a_configuration_names_is_imported_or_fetched(
    own_lora, base_folder, tmp_path, monkeypatch
):
    """Keys by which PEFT imports modules and asks the hub; the module would leave a file."""
    (tmp_path / "evil.py").write_text(
        "import pathlib; pathlib.Path(__file__).with_name('ran').touch()", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    unet = fresh(base_folder)
    set_config(
        own_lora,
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil"},
        megatron_core="evil",
        megatron_config={"x": 1},
        base_model_name_or_path="some/base",
        revision="main",
        runtime_config={"x": 1},
        layer_replication=[[0, 99]],
        modules_to_save=["conv_out"],
        loftq_config={"x": 1},
        task_type="EVIL",
        bias="all",
        use_dora=True,
        init_lora_weights="pissa",
        eva_config={},
        nested=json.loads("[" * 500 + "]" * 500),
    )
    before = fresh(base_folder).conv_out.weight
    assert lora_files.load_lora(own_lora, unet).r == 2
    assert not (tmp_path / "ran").exists()
    assert torch.equal(unet.conv_out.weight, before)


def test_a_configuration_nested_deep(own_lora, unet_shape):
    (own_lora / peft_config.PEFT_CONFIG).write_text(
        '{"r":' + "[" * 100_000 + "]" * 100_000 + "}", encoding="utf-8"
    )
    assert "nested too deeply" in lora_refusal(own_lora, unet_shape)


@pytest.mark.parametrize(
    "name",
    [
        "nowhere",
        "../nowhere",
        "/nowhere/base",
        "~nobody/x",
        "https://host/x",
        "file:///etc",
        "//host/share/base",
        "\\\\host\\share\\base",
        "a/b/c",
        "a b/c",
        "-x/y",
        ".ssh/x",
        "some/base\n",
        "some/\x1b[2J",
        "a\0b/c",
        "x" * 5000,
        5,
        ["some/base"],
        {"a": 1},
        True,
    ],
    ids=lambda value: str(value)[:20].encode("unicode_escape").decode(),
)
def test_a_base_named_oddly_is_refused(own_lora, name):
    set_config(own_lora, base_model_name_or_path=name)
    with pytest.raises(UserError, match="--base_model") as error:
        peft_config.base_of(own_lora)
    assert "adapter_config.json names" in one_line(error)


def test_a_base_named_well(own_lora, tmp_path):
    for name in (
        "some/base",
        "demo/base",
        str(tmp_path),
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ):
        set_config(own_lora, base_model_name_or_path=name)
        assert peft_config.base_of(own_lora) == name
    for name in (None, ""):
        set_config(own_lora, base_model_name_or_path=name)
        assert peft_config.base_of(own_lora) is None


def resave(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def first(tensors: dict, end: str) -> str:
    return next(name for name in tensors if name.endswith(end))


PREFIX = PEFT_PREFIX
WRONG_TENSORS = {
    "NaN": lambda t: t[first(t, "lora_A.weight")].view(-1)[:1].fill_(float("nan")),
    "infinite": lambda t: t[first(t, "lora_B.weight")].view(-1)[:1].fill_(float("inf")),
    "whole numbers": lambda t: t.update(
        {first(t, "lora_A.weight"): torch.zeros(2, 64, dtype=torch.int64)}
    ),
    "complex": lambda t: t.update(
        {first(t, "lora_A.weight"): torch.zeros(2, 64, dtype=torch.complex64)}
    ),
    "another rank": lambda t: t.update({first(t, "lora_A.weight"): torch.zeros(3, 64)}),
    "a scalar": lambda t: t.update({first(t, "lora_A.weight"): torch.tensor(1.0)}),
    "B missing": lambda t: t.pop(first(t, "lora_B.weight")),
    "a stranger": lambda t: t.update({f"{PREFIX}no.lora_A.weight": torch.zeros(2, 3)}),
    "no name": lambda t: t.update({"": torch.zeros(1)}),
    "for a norm": lambda t: t.update(
        {f"{PREFIX}conv_norm_out.lora_{s}.weight": torch.zeros(2, 64) for s in "AB"}
    ),
    "one too many": lambda t: t.update(
        {first(t, "lora_A.weight").replace("lora_A", "lora_C"): torch.zeros(64)}
    ),
    "none": lambda t: t.clear(),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_tensors_that_are_not_right_are_refused(own_lora, base_folder, name):
    resave(own_lora / lora_files.PEFT_WEIGHTS, WRONG_TENSORS[name])
    with pytest.raises(UserError) as error:
        lora_files.load_lora(own_lora, fresh(base_folder))
    one_line(error)
    if name in ("NaN", "infinite"):
        assert "not finite" in one_line(error) and str(
            own_lora / lora_files.PEFT_WEIGHTS
        ) in one_line(error)


@pytest.fixture(scope="module")
def spare(unet_shape) -> list:
    """UNets to put a LoRA into; a copy takes a moment, so there is a new one only where the last
    was used."""
    return [copy.deepcopy(unet_shape)]


KEYS = [*peft_config.KEYS, "target_modules", "rank_pattern", "peft_type"]
KEYS += ["base_model_name_or_path", "auto_mapping"]
near_value = st.sampled_from(
    [2, 4, "LORA", ["to_q", "conv_in"], {"to_q": 2}, True, "to_q", float("nan"), 2**70]
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no-op")
@given(st.dictionaries(st.sampled_from(KEYS), json_value | near_value, max_size=3) | json_value)
def test_any_configuration_is_refused_in_one_line_or_harmless(
    plain_lora, unet_shape, spare, tmp_path_factory, values
):
    """On a UNet without numbers, so that what passes can be put in quickly."""
    folder = tmp_path_factory.getbasetemp() / "any_lora"
    shutil.copytree(plain_lora, folder, dirs_exist_ok=True)
    if isinstance(values, dict):
        set_config(folder, **values)
    else:
        (folder / peft_config.PEFT_CONFIG).write_text(json.dumps(values), encoding="utf-8")
    for load_it in (peft_config.base_of, lambda folder: lora_files.load_lora(folder, spare[-1])):
        try:
            load_it(folder)
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
    if spare[-1]._hf_peft_config_loaded:
        spare[:] = [copy.deepcopy(unet_shape)]


# Checkpoints.


@pytest.fixture
def saved(base_folder, tmp_path):
    """A checkpoint after one step, with the adapters and the optimizer that it came from."""
    unet = fresh(base_folder)
    trainable = adapter.inject(unet, 2, 4, ["to_q"])
    optimizer = torch.optim.AdamW(trainable)
    torch.stack([parameter.square().sum() for parameter in trainable]).sum().backward()
    optimizer.step()
    state = checkpoint.TrainState(1, 0, "logs/x", 1.0, {})
    adapters = Adapters("some/base", unet, trainable)
    folder = tmp_path / "checkpoint-1"
    checkpoint.save(folder, adapters, optimizer, state)
    return folder, adapters, optimizer


@pytest.mark.parametrize("file", [lora_files.PEFT_WEIGHTS, optimizer_state.TENSORS])
@pytest.mark.parametrize("how", ["pickle", "named so", "lying", "NaN", "shape", "missing"])
def test_a_checkpoint_from_a_stranger_is_refused_in_one_line(saved, file, how):
    folder, adapters, optimizer = saved
    checkpoint.restore(folder, adapters, optimizer)
    path = folder / file
    match how:
        case "pickle":
            torch.save({}, path)
        case "named so":
            torch.save({}, path.with_suffix(".bin"))
            path.unlink()
        case "lying":
            path.write_bytes(LYING["overlapping"])
        case "NaN":
            resave(
                path, lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(float("nan"))
            )
        case "shape":
            name = next(name for name, tensor in load_file(path).items() if tensor.ndim)
            resave(path, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
        case "missing":
            path.unlink()
    with pytest.raises(UserError) as error:
        checkpoint.restore(folder, adapters, optimizer)
    line = one_line(error)
    assert str(folder) in line or how == "shape"
    assert ("pickle" in line) == (how in ("pickle", "named so"))
    assert ("not finite" in line) == (how == "NaN")


@pytest.mark.parametrize("named", ["../elsewhere", "logs-run/../x", None])
def test_a_checkpoint_names_no_folder_outside_the_logs(train_here, tmp_path, named):
    flags = ["--data_dir", ROOT / "demo" / "held_out", "--lora_rank", 1, "--target_modules", "to_q"]
    train_here(tmp_path / ".", "run", *flags, "--max_train_steps", 1)
    (before,) = (tmp_path / "logs-run").iterdir()
    state = tmp_path / "run" / "checkpoint-1" / output.STATE
    content = json.loads(state.read_text(encoding="utf-8"))
    assert Path(content["log_dir"]) == Path("logs-run", before.name)
    state.write_text(json.dumps({**content, "log_dir": named}), encoding="utf-8")
    train_here(
        tmp_path, "run", *flags, "--max_train_steps", 2, "--resume_from_checkpoint", "latest"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"run", "logs-run"}
    assert len(list((tmp_path / "logs-run").iterdir())) == 2
    assert not (tmp_path.parent / "elsewhere").exists()


# A base from a stranger.

PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@pytest.fixture
def own_base(base_folder, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "base")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def base_refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load_base(str(folder), torch.float32)
    assert str(folder) in one_line(error)
    return one_line(error)


def load_whole(name: Path | str) -> None:
    """Open a base and load all of it."""
    base = load_base(str(name), torch.float32)
    for part in PARTS:
        getattr(base, part)


@pytest.mark.parametrize("part", PARTS)
def test_weights_of_a_base_that_are_not_right(own_base, tmp_path, part):
    path = own_base / part / f"{PARTS[part]}.safetensors"
    whole = path.read_bytes()
    first_float = next(name for name, tensor in load_file(path).items() if tensor.ndim > 1)

    resave_base(path, lambda tensors: tensors[first_float].view(-1)[:1].fill_(float("nan")))
    with pytest.raises(UserError) as error:
        load_whole(own_base)
    assert f"{own_base}, {part}: {first_float} holds numbers that are not finite" in one_line(error)
    path.write_bytes(whole)
    resave_base(path, lambda tensors: tensors.update({first_float: tensors[first_float][:-1]}))
    assert "cannot be loaded" in base_refusal(own_base)
    for content in (LYING["overlapping"], LYING["a billion bytes"], LYING["metadata of numbers"]):
        path.write_bytes(content)
        assert f"{path} cannot be loaded" in base_refusal(own_base)
    mark = tmp_path / "ran"
    for name, content in pickles(Bomb(mark), tmp_path).items():
        path.write_bytes(content)
        assert (
            f"{path} {'cannot be loaded' if name == 'protocol 0' else 'is a pickle'}"
            in base_refusal(own_base)
        )
    assert not mark.exists()


def resave_base(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shard", ["evil.bin", "../evil.safetensors", "none.safetensors", 5, None])
def test_shards_lie_beside_their_list(own_base, tmp_path, part, shard):
    mark = tmp_path / "ran"
    (own_base / part / "evil.bin").write_bytes(pickle.dumps(Bomb(mark)))
    (own_base / "evil.safetensors").write_bytes(GOOD["plain"])
    index = own_base / part / f"{PARTS[part]}.safetensors.index.json"
    for content in (
        {"metadata": {}, "weight_map": {"a": shard}},
        {"weight_map": [shard]},
        [shard],
        {},
    ):
        index.write_text(json.dumps(content), encoding="utf-8")
        assert f"{index} names other files" in base_refusal(own_base)
    assert not mark.exists()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "values",
    [
        {"auto_map": {"AutoModel": "evil--model.Evil"}},
        {"quantization_config": {"quant_method": "evil"}},
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel:x"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_base_cannot_ask_for_code_from_elsewhere(own_base, part, values):
    path = own_base / part / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8"
    )
    assert f"asks for code or weights from elsewhere ({next(iter(values))})" in base_refusal(
        own_base
    )


def test_a_base_cannot_bring_an_adapter_of_its_own(own_base):
    """transformers would put it in, and take the model that it names where the folder's own is not
    whole."""
    (own_base / "text_encoder" / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "a/b"}', encoding="utf-8"
    )
    assert "elsewhere (adapter_config.json)" in base_refusal(own_base)


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"]
)
def test_a_base_nested_deep(own_base, name):
    (own_base / name).write_text("[" * 100_000 + "]" * 100_000, encoding="utf-8")
    assert f"{Path(name).name} is not valid JSON (nested too deeply)" in base_refusal(own_base)


ODD_VALUES = [None, [], 10**400, -1, 0, 1.5, float("nan"), "x", [[]], {}, [0], True]
SEARCHING = hypothesis.settings().max_examples > 1000


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("unet/config.json", "block_out_channels"),
        ("unet/config.json", "sample_size"),
        ("unet/config.json", "act_fn"),
        ("vae/config.json", "block_out_channels"),
        ("vae/config.json", "latent_channels"),
        ("vae/config.json", "scaling_factor"),
        ("text_encoder/config.json", "num_attention_heads"),
        ("text_encoder/config.json", "hidden_act"),
        ("text_encoder/config.json", "dtype"),
        ("scheduler/scheduler_config.json", "num_train_timesteps"),
        ("scheduler/scheduler_config.json", "beta_schedule"),
        ("tokenizer/tokenizer_config.json", "model_max_length"),
    ],
)
def test_an_odd_configuration_of_a_base_loads_or_is_refused(own_base, file, key):
    path = own_base / file
    whole = json.loads(path.read_text(encoding="utf-8"))
    for value in ODD_VALUES if SEARCHING else ODD_VALUES[:3]:
        path.write_text(json.dumps({**whole, key: value}), encoding="utf-8")
        try:
            load_whole(own_base)
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and str(own_base) in str(error), (value, error)
