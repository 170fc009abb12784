"""The Importance object: validation, arithmetic, files."""

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from fastewc import Importance, uniform_importance
from fastewc.files import save_tensors
from fastewc.testing import assert_within_roundings


def imp(**values):
    return Importance({name: torch.tensor(v) for name, v in values.items()}, num_samples=4, method="m")


def test_holds_what_it_was_given():
    source = {"w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16), "v": torch.ones(2, dtype=torch.float64)}
    made = Importance(source, num_samples=3, method="mine")
    assert isinstance(made, dict)
    assert made["w"].dtype == torch.float32
    assert made["v"].dtype == torch.float64
    assert (made.num_samples, made.method, made.report["w"][0]) == (3, "mine", "given")
    source["v"].zero_()
    assert made["v"].tolist() == [1.0, 1.0]
    parameter = nn.Parameter(torch.ones(2))
    assert not Importance({"p": parameter}, num_samples=1, method="m")["p"].requires_grad


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.tensor([1.0, math.nan]), ValueError),
        (torch.tensor([math.inf]), ValueError),
        (torch.tensor([-1e-9]), ValueError),
        (torch.tensor([1]), TypeError),
        (1.0, TypeError),
        (torch.ones(2, 2).to_sparse(), TypeError),
        (torch.ones(2, device="meta"), TypeError),
        (torch.ones(2).to(torch.float8_e4m3fn), TypeError),
    ],
)
def test_refuses_bad_values_by_name(value, error):
    with pytest.raises(error, match=r"layer\.weight"):
        Importance({"layer.weight": value}, num_samples=1, method="m")


def test_refuses_bad_arguments():
    with pytest.raises(TypeError):
        Importance([("w", torch.ones(1))], num_samples=1, method="m")
    with pytest.raises(TypeError):
        Importance({3: torch.ones(1)}, num_samples=1, method="m")
    with pytest.raises(ValueError, match="num_samples"):
        Importance({}, num_samples=-1, method="m")
    with pytest.raises(TypeError, match="num_samples"):
        Importance({}, num_samples=1.5, method="m")
    with pytest.raises(TypeError, match="num_samples"):
        Importance({}, num_samples=True, method="m")
    with pytest.raises(TypeError, match="method"):
        Importance({}, num_samples=1, method=None)


def test_merge_weighs_by_samples():
    a = Importance({"w": torch.tensor([1.0, 0.0])}, num_samples=1, method="fisher")
    b = Importance({"w": torch.tensor([5.0, 4.0])}, num_samples=3, method="mas")
    both = a.merge(b)
    assert both["w"].tolist() == [4.0, 3.0]
    assert (both.num_samples, both.method) == (4, "fisher+mas")
    assert a.merge(a).method == "fisher"
    assert a["w"].tolist() == [1.0, 0.0]


def test_merge_refuses():
    a = imp(w=[1.0])
    with pytest.raises(ValueError, match="v"):
        a.merge(imp(w=[1.0], v=[1.0]))
    with pytest.raises(ValueError, match="shape"):
        a.merge(imp(w=[1.0, 2.0]))
    with pytest.raises(TypeError):
        a.merge({"w": torch.ones(1)})
    empty = Importance({"w": torch.zeros(1)}, num_samples=0, method="m")
    with pytest.raises(ValueError, match="num_samples"):
        empty.merge(empty)


def test_normalize():
    a = imp(w=[1.0, 3.0], v=[[4.0]])
    assert [t.tolist() for t in a.normalize("max").values()] == [[0.25, 0.75], [[1.0]]]
    assert [t.tolist() for t in a.normalize("trace").values()] == [[0.125, 0.375], [[0.5]]]
    for name, wanted in {"w": [3 / 8, 9 / 8], "v": [[1.5]]}.items():
        wanted = torch.tensor(wanted, dtype=torch.float64)
        assert_within_roundings(a.normalize()[name], wanted, roundings=2)
    assert a.normalize("max").num_samples == 4
    with pytest.raises(ValueError, match="zero"):
        imp(w=[0.0]).normalize()
    with pytest.raises(ValueError, match="zero"):
        Importance({}, num_samples=1, method="m").normalize("max")
    with pytest.raises(ValueError, match="sum"):
        a.normalize("sum")


def test_scale_first_match_wins():
    a = Importance({n: torch.ones(1) for n in ("head.weight", "head.bias", "body.bias")}, num_samples=1, method="m")
    scaled = a.scale({"head.*": 0, "*.bias": 0.5})
    assert {name: value.item() for name, value in scaled.items()} == {
        "head.weight": 0,
        "head.bias": 0,
        "body.bias": 0.5,
    }
    assert a["head.bias"].item() == 1
    with pytest.raises(ValueError, match="tail"):
        a.scale({"tail.*": 2.0})
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="factor"):
            a.scale({"*": bad})
    with pytest.raises(TypeError, match="factor"):
        a.scale({"*": "2"})
    with pytest.raises(TypeError):
        a.scale(2.0)
    with pytest.raises(ValueError, match=r"head\.weight.*too large"):
        a.scale({"*": 1e300})
    for half in (np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        assert a.scale({"*": half})["head.bias"].item() == 0.5


def test_arithmetic_keeps_metadata():
    a, b = imp(w=[1.0]), imp(w=[3.0])
    a.metadata.update(task="one", mine="a")
    b.metadata.update(task="two", theirs="b")
    for made in (a.normalize(), a.scale({"w": 2.0}), a.rename({"w": "v"}), a.copy()):
        assert made.metadata == {"task": "one", "mine": "a"}
        assert made.metadata is not a.metadata
    assert a.merge(b).metadata == {"task": "one", "mine": "a", "theirs": "b"}


def test_rename():
    a = imp(a=[1.0], b=[2.0])
    swapped = a.rename({"a": "b", "b": "a"})
    assert list(swapped) == ["b", "a"]
    assert swapped["b"].item() == 1.0
    assert list(swapped.report) == ["b", "a"]
    with pytest.raises(ValueError, match="c is not"):
        a.rename({"c": "d"})
    with pytest.raises(ValueError, match="become b"):
        a.rename({"a": "b"})
    with pytest.raises(TypeError):
        a.rename({"a": 1})


def test_copies():
    a = imp(w=[1.0, 2.0])
    a.metadata["x"] = "y"
    for other in (pickle.loads(pickle.dumps(a)), copy.deepcopy(a), copy.copy(a), a.copy()):
        assert isinstance(other, Importance)
        assert torch.equal(other["w"], a["w"])
        assert (other.num_samples, other.method, other.report, other.metadata) == (4, "m", a.report, {"x": "y"})
    deep = copy.deepcopy(a)
    deep["w"].zero_()
    assert a["w"].tolist() == [1.0, 2.0]
    assert "2 weights" in repr(a)


@pytest.mark.parametrize(
    ("dtype", "loaded"), [(None, 0), (torch.float64, 0), (torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8)]
)
def test_files(tmp_path, dtype, loaded):
    a = Importance({"w": torch.rand(5, 3), "v": torch.rand(2, dtype=torch.float64)}, num_samples=7, method="si")
    a.save(tmp_path / "a.safetensors", dtype=dtype, metadata={"task": "one"})
    b = Importance.load(tmp_path / "a.safetensors", device="cpu")
    assert (b.num_samples, b.method, b.report, b.metadata) == (7, "si", a.report, {"task": "one"})
    assert list(b) == list(a)
    for name in a:
        assert b[name].dtype == (
            torch.float64 if dtype == torch.float64 or (dtype is None and name == "v") else torch.float32
        )
        assert bool(((b[name].double() - a[name].double()).abs() <= loaded * a[name].double()).all())


def test_files_refuse(tmp_path):
    path = tmp_path / "a.safetensors"
    for dtype in (torch.float16, torch.int8, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match="dtype"):
            imp(w=[1.0]).save(path, dtype=dtype)
    with pytest.raises(TypeError, match="metadata"):
        imp(w=[1.0]).save(path, metadata={"n": 1})
    huge = Importance({"w": torch.tensor([1e60], dtype=torch.float64)}, num_samples=1, method="m")
    with pytest.raises(OverflowError, match="'w'"):
        huge.save(path, dtype=torch.float32)
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        Importance.load(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        Importance.load(path)
    imp(w=[1.0] * 100).save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        Importance.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": "3"},
        {"num_samples": -3},
        {"num_samples": None},
        {"method": 3},
        {"report": {"w": "ab"}},
        {"report": {"w": ["nowhere", "why"]}},
        {"report": ["w"]},
        {"metadata": 3},
    ],
    ids=str,
)
def test_damaged_headers(tmp_path, change):
    path = tmp_path / "a.safetensors"
    tensors = {"w": torch.ones(2)}
    header = {"num_samples": 1, "method": "m", "report": {"w": ["given", "why"]}, "metadata": {}}
    save_tensors(path, tensors, header, "importance")
    assert Importance.load(path).report == {"w": ("given", "why")}
    save_tensors(path, tensors, header | change, "importance")
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        Importance.load(path)
    save_tensors(path, {"w": -torch.ones(2)}, header, "importance")
    with pytest.raises(ValueError, match=r"a\.safetensors.*'w'"):
        Importance.load(path)


def test_a_name_that_safetensors_keeps_for_itself(tmp_path):
    odd = Importance({"__metadata__": torch.ones(1)}, num_samples=1, method="m")
    with pytest.raises(ValueError, match="__metadata__"):
        odd.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_uniform_refuses_what_the_passes_refuse():
    with pytest.raises(ValueError, match="lazy"):
        uniform_importance(nn.LazyLinear(3))
    with pytest.raises(NotImplementedError, match="complex"):
        uniform_importance(nn.Linear(2, 2, dtype=torch.complex64))

    class FullyShardedDataParallel(nn.Linear):  # recognised by name, wherever it stands
        pass

    with pytest.raises(NotImplementedError, match="FullyShardedDataParallel"):
        uniform_importance(nn.Sequential(FullyShardedDataParallel(2, 2)))
    with pytest.raises(TypeError, match="Module"):
        uniform_importance(lambda x: x)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).train()  # any mode will do
    model[0].requires_grad_(False)
    assert list(uniform_importance(model, exclude=("0.*", "*.bias"))) == ["1.weight"]


def test_uniform():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1).double())
    model[0].bias.requires_grad_(False)
    got = uniform_importance(model)
    assert list(got) == ["0.weight", "1.weight", "1.bias"]
    assert all(bool((value == 1).all()) and not value.requires_grad for value in got.values())
    assert got["1.weight"].dtype == torch.float64
    assert (got.num_samples, got.method) == (1, "uniform")
    assert list(uniform_importance(model, "1.*")) == ["0.weight"]
    with pytest.raises(ValueError, match="nothing"):
        uniform_importance(model, "nothing")
    with pytest.raises(ValueError, match="no trainable"):
        uniform_importance(model.requires_grad_(False))
