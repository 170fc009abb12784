"""Every op, every implementation that runs here, every case, every dtype, against float64. Grows by itself."""

import importlib
import pkgutil

import pytest
import torch

from fastewc import ops
from fastewc._dispatch import IMPLS, OPS, choose
from fastewc.testing import assert_all_within_roundings

CASES = [
    pytest.param(op, case, dtype, id=f"{op}-{case.id}-{str(dtype).removeprefix('torch.')}")
    for op in OPS
    for case in importlib.import_module(f"fastewc.ops.{op}.cases").CASES
    for dtype in case.dtypes
]


@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_every_implementation_agrees_with_float64(op, case, dtype, device):
    for impl in IMPLS:
        try:
            choose(op, impl, torch.device(device))
        except NotImplementedError:
            with pytest.raises(NotImplementedError, match=impl):  # an explicit request never falls back
                case.run(impl, dtype, device)
            continue
        got = case.run(impl, dtype, device)
        assert_all_within_roundings(
            got, case.oracle(dtype), roundings=case.roundings, error_scale=case.error_scale(dtype), context=impl
        )
        again = case.run(impl, dtype, device)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), f"{impl} is not deterministic"


def test_every_op_folder_is_listed_and_complete():
    folders = {module.name for module in pkgutil.iter_modules(ops.__path__) if module.ispkg}
    assert folders == set(OPS)
    for op in OPS:
        for part in ("api", "reference", "cases"):
            assert importlib.util.find_spec(f"fastewc.ops.{op}.{part}"), f"{op}/{part}.py is missing"
        assert callable(getattr(importlib.import_module(f"fastewc.ops.{op}"), op)) and callable(getattr(ops, op))
