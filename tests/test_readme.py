"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from diffes.spaces.loop import run_search
from diffes.spaces.schedule import Schedule, Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import STRATEGIES, Evaluation

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_strategy_of_the_readme_searches() -> None:
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "@strategy(" in block)
    try:
        exec(code, {})
        space = SearchSpace.mean_sparsity(Stages.equal(4), 8, 0.5)
        strategy = STRATEGIES.get("hill_climb")(space, seed=0)

        def evaluate(schedules: Sequence[Schedule], fidelity: float = 1.0) -> list[Evaluation]:
            return [Evaluation(s, -float(abs(s.levels[0] - 8)), fidelity=fidelity) for s in schedules]

        result = run_search(strategy, evaluate, max_evals=60)
        assert result.best.fitness > result.evaluations[0].fitness
    finally:
        STRATEGIES.unregister("hill_climb")


def test_ci_runs_the_command_of_the_readme() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    assert blocks[0].strip().endswith("diffes search") and blocks[1].strip().endswith("-m pytest -n 2 --dist loadfile")


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert links and "@@" not in text
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in {head.lower().replace(" ", "-") for head in heads}, link
