"""Files: what was written comes back; what is damaged, foreign or of another model is refused and nothing changes."""

import json
import os
import struct

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fastewc import EWC, Importance, files
from tests.helpers import assert_same, filled, importance_of, net


def test_ewc_round_trip(tmp_path):
    model = net()
    ewc = filled(model)
    ewc.save(tmp_path / "ewc.safetensors")
    loaded = EWC.load(tmp_path / "ewc.safetensors", net(1))
    assert_same(ewc, loaded)
    assert EWC.load(str(tmp_path / "ewc.safetensors"), net(1), ewc_lambda=7.0).ewc_lambda == 7.0


def test_header_tells_what_the_file_holds(tmp_path):
    filled(net()).save(tmp_path / "f")
    raw = (tmp_path / "f").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["fastewc"])
    assert header["kind"] == "ewc" and header["format_version"] == 1 and header["library_version"]
    assert header["ewc_lambda"] == 4.0 and header["variant"] == "plain" and header["gamma"] == 0.5
    assert header["anchor_kind"] == "weighted" and header["num_tasks"] == 2 and header["num_samples"] == 20
    assert header["methods"] == ["test"] and header["tensors"]["anchor/0.weight"]["shape"] == [4, 3]


def test_an_unconsolidated_object_can_be_saved(tmp_path):
    EWC(net(), ewc_lambda=3.0).save(tmp_path / "f")
    assert EWC.load(tmp_path / "f", net()).num_tasks == 0


def test_importance_round_trip(tmp_path):
    imp = importance_of(net())
    imp.save(tmp_path / "imp")
    loaded = Importance.load(tmp_path / "imp")
    assert loaded.keys() == imp.keys() and all(torch.equal(loaded[n], imp[n]) for n in imp)
    assert (loaded.num_samples, loaded.method) == (imp.num_samples, imp.method)


def test_another_model_is_refused_or_taken_in_part(tmp_path):
    filled(net(), exclude=()).save(tmp_path / "f")
    grown = net(out=3)
    with pytest.raises(ValueError, match=r"grown: 2\.weight, 2\.bias"):
        EWC.load(tmp_path / "f", grown)
    with pytest.warns(UserWarning, match="grown: 2.weight, 2.bias"):
        ewc = EWC.load(tmp_path / "f", grown, strict=False)
    assert not ewc.importances()["2.weight"][2].any() and ewc.importances()["2.weight"][:2].all()
    other = torch.nn.ModuleDict({"x": torch.nn.Linear(3, 4), "y": torch.nn.Linear(4, 2)})
    with pytest.raises(ValueError, match=r"missing: x\.weight.*unknown: 0\.bias"):
        EWC.load(tmp_path / "f", other)
    rename = {"0.weight": "x.weight", "0.bias": "x.bias", "2.weight": "y.weight", "2.bias": "y.bias"}
    assert list(EWC.load(tmp_path / "f", other, rename=rename).importances()) == list(rename.values())


def test_precision_is_not_lost_unnoticed(tmp_path):
    filled(net(), anchor="latest").save(tmp_path / "f")
    with pytest.raises(ValueError, match=r"anchors would lose precision: 0\.weight"):
        EWC.load(tmp_path / "f", net().bfloat16())
    with pytest.warns(UserWarning, match=r"narrowed: 0\.weight"):
        ewc = EWC.load(tmp_path / "f", net().bfloat16(), strict=False)
    assert ewc.anchors()["0.weight"].dtype == torch.bfloat16


def test_wrong_kind_of_file(tmp_path):
    importance_of(net()).save(tmp_path / "imp")
    with pytest.raises(ValueError, match=r"holds 'importance', wanted 'ewc'; read it with fastewc\.Importance\.load"):
        EWC.load(tmp_path / "imp", net())
    save_file({"a": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="not one that fastewc wrote"):
        EWC.load(tmp_path / "foreign", net())
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Importance.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        EWC.load(tmp_path / "none", net())


def test_every_truncation_is_a_clear_error(tmp_path):
    filled(net()).save(tmp_path / "f")
    whole = (tmp_path / "f").read_bytes()
    for length in {0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 4, len(whole) - 1}:
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            EWC.load(tmp_path / "cut", net())


def test_a_newer_format_is_refused_by_name(tmp_path):
    header = {"kind": "ewc", "format_version": 99, "library_version": "9.9", "tensors": {}}
    save_file({"a": torch.ones(1)}, tmp_path / "f", metadata={"fastewc": json.dumps(header)})
    with pytest.raises(ValueError, match=r"format version 99, written by fastewc 9\.9.*Upgrade"):
        files.load_tensors(tmp_path / "f", "ewc")


def test_tensors_must_be_those_of_the_header(tmp_path):
    header = {"kind": "ewc", "format_version": 1, "tensors": {"a": {"shape": [2], "dtype": "torch.float32"}}}
    save_file({"a": torch.ones(1)}, tmp_path / "f", metadata={"fastewc": json.dumps(header)})
    with pytest.raises(ValueError, match=r"differ from the file's own header.*a"):
        files.load_tensors(tmp_path / "f", "ewc")


def test_a_failed_save_keeps_the_old_file_and_leaves_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "f"
    importance_of(net()).save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        importance_of(net(), 5.0).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["f"]


def test_tied_and_strided_tensors_are_saved_by_value(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    files.save_tensors(tmp_path / "f", {"a": base.t(), "b": base, "c": base[1]}, {}, "test")
    loaded, _ = files.load_tensors(tmp_path / "f", "test")
    assert torch.equal(loaded["a"], base.t()) and torch.equal(loaded["b"], base) and torch.equal(loaded["c"], base[1])


def test_a_full_disk_is_an_os_error_and_the_mode_is_the_umask_s(tmp_path, monkeypatch):
    path = tmp_path / "f"
    importance_of(net()).save(path)
    mask = os.umask(0o022)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask

    def full(*args, **kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"cannot write .*No space left"):
        importance_of(net()).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["f"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    importance_of(net()).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and Importance.load(tmp_path / "real").num_samples == 10


@pytest.mark.parametrize("change", [{"num_tasks": -1}, {"num_samples": "3"}, {"methods": None}, {"gamma": True}])
def test_damaged_header_values(tmp_path, change):
    ewc = filled(net())
    with pytest.raises(ValueError):
        ewc.load_state_dict(ewc.state_dict() | change)
    with pytest.raises(TypeError, match="ewc_lambda must be a number"):
        ewc.load_state_dict(ewc.state_dict() | {"ewc_lambda": "3"})
