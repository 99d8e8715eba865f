from __future__ import annotations

import router_features


def test_the_table_of_features_is_that_of_the_tests() -> None:
    assert router_features.RESULTS.read_text(encoding="utf-8") == router_features.table()
    assert {line.split(" | ")[-2] for line in router_features.table().splitlines()[2:]} == {"equal", "refused"}
