"""The fine-tuning benchmark on texts of its own: every arm is trained, and its rows say what was measured."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bf16_training

pytest.importorskip("transformers")

TINY = (
    *("--layers", "1", "--width", "32", "--positions", "16", "--batch", "4", "--book-steps", "8", "--steps", "12"),
    *("--fisher-samples", "8", "--held-out-samples", "8", "--seeds", "2", "--lr", "2e-5", "--threads", "1"),
)


def test_every_arm_is_measured(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i, name in enumerate(bf16_training.DOMAINS.values()):
        (tmp_path / "text" / name).write_text(" ".join(str(n * n + i) for n in range(2000)))
    threads = torch.get_num_threads()
    assert bf16_training.main(["--data-root", str(tmp_path), "--out", str(tmp_path / "rows.json"), *TINY]) == 0
    torch.set_num_threads(threads)
    rows = {one["name"]: one for one in json.loads((tmp_path / "rows.json").read_text())}
    assert set(rows) == {f"{domain}, {arm}" for domain in bf16_training.DOMAINS for arm in bf16_training.ARMS}
    plays = {arm: rows[f"plays, {arm}"] for arm in bf16_training.ARMS}
    assert {arm: sum(one["extra"]["bytes_per_weight"].values()) for arm, one in plays.items()} == {
        "float32": 16, "bfloat16": 8, "master weights": 14, "master weights, bfloat16 moments": 10,
    }  # fmt: skip
    for one in plays.values():
        extra = one["extra"]
        assert len(extra["losses"]) == 2 and one["median"] == pytest.approx(sum(extra["losses"]) / 2)
        assert extra["difference"] == pytest.approx(one["median"] - plays["float32"]["median"])
    # Plain bfloat16 stays behind, and master weights do not.
    start = plays["float32"]["extra"]["before"]["plays"]
    gain = {arm: start - one["median"] for arm, one in plays.items()}
    assert 0 < gain["bfloat16"] < 0.7 * gain["float32"] < 0.8 * gain["master weights"]


def test_a_missing_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTEWC_DATA", raising=False)
    with pytest.raises(ValueError, match="--data-root PATH or set FASTEWC_DATA"):
        bf16_training.main([])
