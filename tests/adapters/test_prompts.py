"""Prompts of text-to-image models: disjoint splits, and files that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffes.adapters import ModelAdapter, adapter_for, load_pipeline
from diffes.adapters.prompts import default_prompts
from diffes.adapters.text_to_image import TextToImageAdapter
from diffes.errors import DiffesError
from diffes.files import SHIPPED


def test_prompts_of_searches_reports_and_calibration_are_disjoint() -> None:
    shipped = adapter_for(load_pipeline("emoji-sdxl"))
    assert isinstance(shipped, TextToImageAdapter)
    for prompts in (shipped.prompts, default_prompts()):
        with np.load(SHIPPED / "emoji-sdxl" / "calibration.npz") as data:
            calibration = set(prompts["calibration"]) | set(data["prompts"].tolist())
        search, heldout = set(prompts["search"]), set(prompts["heldout"])
        assert len(search) >= 64 and len(heldout) >= 64
        assert not search & heldout and not search & calibration and not heldout & calibration


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ("[]", "holds no prompts"),
        ('{"search": ["a"]}', "at least one"),
        ('{"search": ["a", ""], "heldout": ["b"]}', "none empty"),
        ('{"search": ["a"], "heldout": ["b", "a"]}', "'a' in both 'search' and 'heldout'"),
    ],
)
def test_unusable_prompts_are_refused(tiny_sdxl: ModelAdapter, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(content)
    with pytest.raises(DiffesError, match=message):
        tiny_sdxl.use_prompts(path)
