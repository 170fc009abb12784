"""The memory benchmark: every storage that is held is counted, once, and every configuration has a row of its own."""

import pytest
import torch

from benchmarks import memory, peak_memory
from benchmarks.memory import CONFIGURATIONS, SMALLEST, Configuration, measure

SHAPES = [(300, 512), (512,), (700, 300)]

pytestmark = pytest.mark.filterwarnings("ignore:anchors were rounded")


@pytest.mark.parametrize(
    ("configuration", "wanted"),
    [
        (Configuration(how="none"), 8),
        (Configuration(), 16),
        (Configuration(ewc=SMALLEST), 11),
        (Configuration("SGD", "attach"), 8),
        (Configuration("SGD", "penalty", {"importance_dtype": torch.uint8}), 5),
        (Configuration(arguments={"path_integral": True}), 24),
        (Configuration(ewc=SMALLEST, dtype=torch.bfloat16), 7),
    ],
    ids=lambda value: value.name if isinstance(value, Configuration) else None,
)
def test_what_is_held_is_counted_once(configuration, wanted):
    found = measure(configuration, "cpu", SHAPES)
    assert wanted <= found["held"] < wanted + 0.05  # counters of steps, scales of codes


@pytest.mark.skipif(not peak_memory.CLEAR.exists(), reason="the high-water mark is read from Linux's /proc")
def test_a_peak_is_that_of_its_call():
    before, highest = peak_memory.high_water(lambda: torch.ones(64 << 18)) or (0, 64 << 20)
    assert 60 << 20 < highest - before < 100 << 20


def test_names_tell_configurations_apart():
    assert len(CONFIGURATIONS) == len(memory._configurations())
    assert all(CONFIGURATIONS[name].name == name for name in CONFIGURATIONS)
