"""Damaged and foreign files never become a teacher: hundreds of them, each refused or harmless."""

import pickle
import random
from collections import Counter, OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kd_det.sources import SourceUnavailable, Teacher
from kd_det.sources.strict import load_strictly
from kd_det.sources.weights_file import file_fingerprint
from tests import toys


def network(*, width: int = 16, classes: int = 3, depth: int = 2, norm: bool = True) -> nn.Module:
    """A detector of a few thousand weights: a backbone with norms, and a head."""
    body = nn.Sequential()
    for i in range(depth):
        body.add_module(f"conv{i}", nn.Conv2d(width if i else 3, width, 3))
        if norm:
            body.add_module(f"norm{i}", nn.BatchNorm2d(width))
    head = nn.Conv2d(width, classes, 1)
    return nn.ModuleDict({"backbone": body, "head": head})


@pytest.fixture(scope="module")
def trained() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model = network()
    toys.randomize_norms(model)
    return model.state_dict()


def outcome(path: Path, trained: dict[str, torch.Tensor], sha256: str = "") -> str:
    """What became of a file: ``same`` weights, ``other`` weights, or a sentence of refusal."""
    model = network()
    for p in model.parameters():
        nn.init.zeros_(p)
    try:
        load_strictly(model, str(path), what="The teacher", sha256=sha256)
    except (ValueError, SourceUnavailable) as e:
        sentence = str(e)
    else:
        sentence = ""
    if sentence:
        assert str(path) in sentence
        assert "\n" not in sentence
        assert len(sentence) < 800
        return sentence
    found = model.state_dict()
    return "same" if all(torch.equal(x, found[name]) for name, x in trained.items()) else "other"


# -- random corruptions ---------------------------------------------------------------------------


def block(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice([1, 16, 512, 4096]))


def truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(rng: random.Random, data: bytes) -> bytes:
    result = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 10, 1000])):
        result[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(result)


def zeroed(rng: random.Random, data: bytes) -> bytes:
    a, b = block(rng, data)
    return data[:a] + bytes(b - a) + data[b:]


def overwritten(rng: random.Random, data: bytes) -> bytes:
    a, b = block(rng, data)
    return data[:a] + rng.randbytes(b - a) + data[b:]


def duplicated(rng: random.Random, data: bytes) -> bytes:
    a, b = block(rng, data)
    return data[:b] + data[a:]


def lost(rng: random.Random, data: bytes) -> bytes:
    a, b = block(rng, data)
    return data[:a] + data[b:]


def shuffled(rng: random.Random, data: bytes) -> bytes:
    size = rng.choice([512, 1024, 4096])
    blocks = [data[i : i + size] for i in range(0, len(data), size)]
    i, j = rng.sample(range(len(blocks)), 2)
    blocks[i], blocks[j] = blocks[j], blocks[i]
    return b"".join(blocks)


def moved(rng: random.Random, data: bytes) -> bytes:
    """Bytes before the archive, which zip tools look past."""
    return data[: rng.choice([1, 64, 512, 4096])] + data


CORRUPTIONS = (truncated, flipped, zeroed, overwritten, duplicated, lost, shuffled, moved)
FORMATS = ("teacher.pth", "legacy.pth", "teacher.pkl")


def write(folder: Path, name: str, trained: dict[str, torch.Tensor]) -> Path:
    path = folder / name
    if name.endswith(".pkl"):
        arrays = {k: v.numpy() for k, v in trained.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "us"}))
    else:
        zipped = name == "teacher.pth"
        torch.save({"model": trained}, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_an_undamaged_file_loads(name, trained, tmp_path):
    path = write(tmp_path, name, trained)
    assert outcome(path, trained) == "same"
    assert outcome(path, trained, file_fingerprint(str(path))[:12]) == "same"


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_a_damaged_zip_never_trains(corrupt, trained, tmp_path):
    path = write(tmp_path, "teacher.pth", trained)
    data = path.read_bytes()
    rng = random.Random(corrupt.__name__)
    outcomes = Counter()
    for _ in range(60):
        path.write_bytes(corrupt(rng, data))
        outcomes[outcome(path, trained)] += 1
    assert not outcomes["other"]
    assert outcomes["same"] < 30  # what hits the padding between records does no harm


def test_every_flipped_bit_of_a_weight_is_seen(trained, tmp_path):
    path = write(tmp_path, "teacher.pth", trained)
    data = path.read_bytes()
    weight = trained["backbone.conv1.weight"].numpy().tobytes()
    start = data.index(weight)
    for bit in range(0, 8 * len(weight), 1009):
        damaged = bytearray(data)
        damaged[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        # PyTorch itself sees nothing.
        assert not torch.equal(
            torch.load(path)["model"]["backbone.conv1.weight"], trained["backbone.conv1.weight"]
        )
        assert "does not match its checksum" in outcome(path, trained)


@pytest.mark.parametrize("name", FORMATS)
def test_with_a_hash_only_the_very_file_loads(name, trained, tmp_path):
    path = write(tmp_path, name, trained)
    data, sha256 = path.read_bytes(), file_fingerprint(str(path))
    for corrupt in CORRUPTIONS:
        rng = random.Random(corrupt.__name__)
        for _ in range(10):
            damaged = corrupt(rng, data)
            path.write_bytes(damaged)
            seen = outcome(path, trained, sha256[:8])
            assert seen == "same" if damaged == data else f"{sha256[:8]} is expected" in seen


@pytest.mark.parametrize("name", FORMATS[1:])
@pytest.mark.parametrize("corrupt", CORRUPTIONS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_formats_without_checksums_load_or_say_a_sentence(name, corrupt, trained, tmp_path):
    path = write(tmp_path, name, trained)
    data = path.read_bytes()
    rng = random.Random(corrupt.__name__)
    for _ in range(20):
        path.write_bytes(corrupt(rng, data))
        outcome(path, trained)  # raises what is no sentence


# -- structural corruptions -----------------------------------------------------------------------


def changed(**entries):
    """Entries of another value; dots in names are written ``__``."""
    new = {name.replace("__", "."): x for name, x in entries.items()}
    return lambda state: {**state, **{k: f(state[k]) for k, f in new.items()}}


def without(*prefixes):
    return lambda state: {k: v for k, v in state.items() if not k.startswith(prefixes)}


def renamed(old, new):
    return lambda state: {k.replace(old, new): v for k, v in state.items()}


def of(**kwargs):
    return lambda state: network(**kwargs).state_dict()


def at(index, value):
    def change(x):
        x = x.clone()
        x.view(-1)[index] = value
        return x

    return change


def everywhere(change):
    return lambda state: {k: change(v) for k, v in state.items()}


WEIGHT, VAR = "head__weight", "backbone__norm0__running_var"
STRUCTURAL = {
    # Names and shapes.
    "missing weight": (without("head.weight"), "Missing: head.weight"),
    "missing bias": (without("head.bias"), "Missing: head.bias"),
    "missing statistics": (without("backbone.norm0.running"), "Missing: backbone.norm0.running_m"),
    "missing head": (without("head"), "Missing: head.weight, head.bias"),
    "backbone only": (lambda s: network().backbone.state_dict(), "Missing: backbone.conv0.weight"),
    "empty": (lambda s: {}, "0 of 14 entries"),
    "empty ordered": (lambda s: OrderedDict(), "0 of 14 entries"),
    "extra weight": (lambda s: {**s, "ema.decay": torch.ones(1)}, "In the file only: ema.decay"),
    "extra layer": (of(depth=3), "In the file only: backbone.conv2.weight"),
    "shallower": (of(depth=1), "Missing: backbone.conv1.weight"),
    "without norms": (of(norm=False), "Missing: backbone.norm0.weight"),
    "renamed": (renamed("head.weight", "head.weights"), "Did you mean 'head.weights'"),
    "renamed backbone": (renamed("backbone", "bottom_up"), "Missing: backbone.conv0.weight"),
    "other prefix": (lambda s: {f"net.{k}": v for k, v in s.items()}, "Missing: backbone"),
    "upper case": (lambda s: {k.upper(): v for k, v in s.items()}, "Did you mean 'BACKBONE"),
    "other classes": (of(classes=80), r"head.weight ((80, 16, 1, 1) in the file, (3, 16, 1, 1)"),
    "other width": (of(width=8), "Of another shape: backbone.conv0.weight"),
    "transposed": (changed(**{WEIGHT: lambda x: x.transpose(0, 1)}), "Of another shape"),
    "flat": (changed(**{WEIGHT: torch.flatten}), "Of another shape"),
    "scalar": (changed(**{WEIGHT: torch.mean}), "Of another shape"),
    "empty weight": (changed(**{WEIGHT: lambda x: x[:0]}), "Of another shape"),
    "extra axis": (changed(**{WEIGHT: lambda x: x[None]}), "Of another shape"),
    "swapped": (
        lambda s: {**s, "head.bias": s["head.weight"], "head.weight": s["head.bias"]},
        "Of another shape",
    ),
    # Kinds of numbers and values.
    "integers": (changed(**{WEIGHT: torch.Tensor.int}), "head.weight is of torch.int32"),
    "bytes": (changed(**{WEIGHT: torch.Tensor.byte}), "head.weight is of torch.uint8"),
    "booleans": (changed(**{WEIGHT: torch.Tensor.bool}), "head.weight is of torch.bool"),
    "complex": (changed(**{WEIGHT: lambda x: x + 1j}), "head.weight is of torch.complex64"),
    "all integers": (everywhere(torch.Tensor.long), "and 11 more"),
    "nan": (changed(**{WEIGHT: at(7, float("nan"))}), "head.weight is not finite"),
    "inf": (changed(head__bias=at(0, float("inf"))), "head.bias is not finite"),
    "-inf": (changed(head__bias=at(2, -float("inf"))), "head.bias is not finite"),
    "nan everywhere": (everywhere(lambda x: x * float("nan")), "and 11 more"),
    "nan statistics": (changed(**{VAR: at(0, float("nan"))}), "norm0.running_var is not finite"),
    "negative variance": (changed(**{VAR: at(3, -0.1)}), "norm0.running_var is negative"),
    "too large for float32": (
        changed(**{WEIGHT: lambda x: x.double() * 1e300}),
        "head.weight is not finite",
    ),
    "meta": (changed(**{WEIGHT: lambda x: x.to("meta")}), "cannot be read as a checkpoint"),
    # What is no state dict.
    "list": (lambda s: list(s.values()), "holds a list"),
    "tensor": (lambda s: s["head.weight"], "cannot be read as a checkpoint"),
    "string": (lambda s: "model", "holds a str"),
    "number": (lambda s: 3, "holds a int"),
    "nothing": (lambda s: None, "holds a NoneType"),
    "nested": (lambda s: {"net": dict(s)}, "'net' is a dict"),
    "nested weight": (changed(**{WEIGHT: lambda x: {"data": x}}), "'head.weight' is a dict"),
    "listed weight": (changed(**{WEIGHT: torch.Tensor.tolist}), "'head.weight' is a list"),
    "no tensor": (changed(**{WEIGHT: lambda x: None}), "'head.weight' is a NoneType"),
    "a number for a weight": (changed(**{WEIGHT: lambda x: 0.5}), "'head.weight' is a float"),
    "numbered": (lambda s: dict(enumerate(s.values())), "entry 0 is a Tensor"),
}


@pytest.mark.parametrize("case", STRUCTURAL)
@pytest.mark.parametrize("outer", [True, False], ids=["under model", "bare"])
def test_a_file_of_another_structure_is_refused(case, outer, trained, tmp_path):
    change, words = STRUCTURAL[case]
    if not outer and words.startswith("holds"):
        words = "cannot be read as a checkpoint"  # in Detectron2's words
    path = tmp_path / "teacher.pth"
    content = change(dict(trained))
    torch.save({"model": content} if outer else content, path)
    assert words in outcome(path, trained)


class Trap:
    """Pickled, it runs code when it is read."""

    def __reduce__(self):
        return (SimpleNamespace, ())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "cannot be read as a checkpoint"),
        ("weights", "cannot be read as a checkpoint"),
        (None, "cannot be read as a checkpoint"),
        ({"optimizer": {"state": {}}, "iteration": 3}, "'optimizer' is a dict, not a tensor"),
        ({"state_dict": {"a": torch.ones(1)}, "meta": {}}, "'state_dict' is a dict, not a tensor"),
        ({"model": {"head.weight": Trap()}}, "types.SimpleNamespace"),
        (Trap(), "types.SimpleNamespace"),
    ],
    ids=["list", "text", "none", "optimizer", "state_dict", "trap inside", "trap"],
)
@pytest.mark.parametrize("name", ["teacher.pth", "teacher.pkl"])
def test_a_file_of_something_else_is_refused(content, words, name, trained, tmp_path):
    path = tmp_path / name
    if name.endswith(".pkl"):
        path.write_bytes(pickle.dumps(content))
        words = "cannot be read as a checkpoint" if "dict" in words else words
    else:
        torch.save(content, path)
    assert words in outcome(path, trained)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {f"module.{k}": v for k, v in s.items()},
        without("backbone.norm0.num_batches_tracked"),
        everywhere(lambda x: x.double() if x.is_floating_point() else x),
        lambda s: {k: v.numpy() for k, v in s.items() if v.dim()},
    ],
    ids=["module.", "num_batches_tracked", "double", "numpy"],
)
def test_the_same_weights_in_another_dress_load(change, trained, tmp_path):
    path = tmp_path / "teacher.pkl"
    arrays = {k: np.asarray(v) for k, v in change(dict(trained)).items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "us"}))
    assert outcome(path, {k: v for k, v in trained.items() if v.dim()}) == "same"


# -- the teacher's field --------------------------------------------------------------------------


def test_a_swapped_teacher_is_told_by_its_hash(files, tmp_path):
    config, weights = files
    sha256 = file_fingerprint(weights)
    Teacher(config_file=config, weights=weights, sha256=sha256.upper()).prepare(("features",))
    _, other = toys.save_teacher(tmp_path, fpn=16, seed=2)
    with pytest.raises(ValueError, match=rf"other|{sha256[:10]} is expected. .* correct SHA256"):
        Teacher(config_file=config, weights=other, sha256=sha256[:10]).prepare(("features",))


@pytest.mark.parametrize("text", ["1234567", "f10217xx", "0" * 65, "sha256:0123456789"])
def test_a_hash_is_hexadecimal(text):
    with pytest.raises(ValueError, match=f"8 to 64 hexadecimal digits.*'{text}'"):
        Teacher(config_file="x.yaml", sha256=text)


def test_a_hash_of_a_model_makes_no_sense():
    with pytest.raises(ValueError, match="that of a file"):
        Teacher(model=nn.Identity(), sha256="0" * 8)
