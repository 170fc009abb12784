"""Every input of torch's own module tests with parameters: exact, refused for a named reason, or skipped by rule."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from fastewc.per_sample.rules import RULES
from tests.per_sample.module_sweep import inputs_of, names, outcome, outcomes

try:
    NAMES = names()
except ImportError as error:
    pytest.skip(f"torch.testing._internal can't be imported: {error}", allow_module_level=True)

#: Modules with inputs that can't be right, and what the error says: a sample has no gradient of its own there.
REFUSED = {f"nn.BatchNorm{d}d": {"not_tracking_stats": "uses the statistics of the batch"} for d in (1, 2, 3)}
#: Inputs without samples.
SKIPPED = {"nn.PReLU": {"the input is one number"}, "nn.LinearCrossEntropyLoss": {"one number for the whole batch"}}
#: Modules whose parameters take "batch-1" today. May only get fewer.
BY_SAMPLE: set[str] = set()
MOST_REFUSED = 0.05


@pytest.fixture(scope="module")
def kinds():
    return Counter()


@pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored")  # torch, of its own inputs
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # an encoder's fast path without gradients
@pytest.mark.parametrize("name", NAMES)
def test_module(name, kinds):
    found = list(outcomes(name))
    kinds.update(one.kind for one in found)
    assert not [str(one) for one in found if one.kind == "wrong"]
    refused = {one.desc: one.why for one in found if one.kind == "refused"}
    assert refused.keys() == REFUSED.get(name, {}).keys(), refused
    assert all(part in refused[desc] for desc, part in REFUSED.get(name, {}).items()), refused
    assert {one.why for one in found if one.kind == "skipped"} == SKIPPED.get(name, set())
    paths = sum((Counter(dict(one.paths)) for one in found), Counter())
    assert (paths["batch-1"] > 0) == (name in BY_SAMPLE), paths
    assert paths["unused"] == 0


def test_few_are_refused(kinds):
    if not kinds:
        pytest.skip("no module was swept in this run")
    assert kinds["refused"] <= MOST_REFUSED * (kinds["refused"] + kinds["exact"])


def test_a_wrong_rule_is_found(monkeypatch):
    def halved(call):
        return [replace(use, segment=lambda g, *saved, make=use.segment: make(g / 2, *saved)) for use in right(call)]

    right = RULES[torch.conv2d]
    monkeypatch.setitem(RULES, torch.conv2d, halved)
    assert outcome("nn.Conv2d", inputs_of("nn.Conv2d")[0]).kind == "wrong"
