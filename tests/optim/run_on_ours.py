"""A pytest plugin: whatever is imported after it finds our optimizers, and no others, in torch's optim_db.

torch's file of tests also imports its neighbours (``from optim.test_lrscheduler import …``), which are about other
things: they are there, and empty.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch.testing._internal import common_optimizers

from tests.optim import optimizer_infos


class EmptyNeighbours(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name.split(".")[0] != "optim":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=name == "optim")

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _empty_class


def _empty_class(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


common_optimizers.optim_db[:] = map(optimizer_infos.info, optimizer_infos.NAMES)
sys.meta_path.append(EmptyNeighbours())
