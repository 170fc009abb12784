"""Rules that a test registers are gone after it."""

import pytest

from fastewc.per_sample import user_rules


@pytest.fixture(autouse=True)
def rules(monkeypatch):
    """All that are registered."""
    found = dict(user_rules._RULES)
    monkeypatch.setattr(user_rules, "_RULES", found)
    return found
