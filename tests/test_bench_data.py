"""The data bench runs every source for real and says which feed training."""

from physnb import bench_data
from physnb.config import FLUIDS, SIMULATED


def test_every_source_is_timed_against_both_presets(monkeypatch):
    monkeypatch.setattr(bench_data, "CLIPS", 4)
    monkeypatch.setattr(bench_data, "VIDEOS", 1)
    monkeypatch.setattr(bench_data, "consumption", lambda config: 10.0 * config.batch)
    found = bench_data.bench_data(rounds=1)
    assert found["consumed_clips_per_second"]["full"]["median"] == 160
    rows = {row["source"]: row for row in found["sources"]}
    assert set(rows) == {*SIMULATED, *FLUIDS, "templates", "all scenarios mixed", "phyworld file", "videos"}
    for row in rows.values():
        assert row["ratio_quick"] == 2 * row["ratio_full"] == row["clips_per_second"] / 80
        assert row["met"] == (row["ratio_full"] >= (10 if row["source"] in SIMULATED else 2))
    assert {name for name, row in rows.items() if row["filling"]} == {"videos", *FLUIDS}
