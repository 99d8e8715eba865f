"""What of diffusers works with a routed model, as the tests show it: the table of their marks `feature`.

"equal": to a model masked by hand, or to the dense one where that is the question. "refused": by an error that names
the way out, before anything is changed.

    python benchmarks/router_features.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "router_features.md"


def features(path: Path) -> Iterator[tuple[str, str, str]]:
    """What, its outcome and the test that shows it, of a file of tests."""
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef):
            for mark in function.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func).split(".")[-1] == "feature":
                    what, outcome = (ast.literal_eval(argument) for argument in mark.args)
                    yield what, outcome, f"`{path.relative_to(ROOT).as_posix()}::{function.name}`"


def table() -> str:
    """The table in Markdown, a row a feature and outcome."""
    shown: dict[tuple[str, str], list[str]] = {}
    for path in sorted(ROOT.glob("tests/*/test_*.py")):
        for what, outcome, test in features(path):
            shown.setdefault((outcome, what), []).append(test)
    rows = [f"| {what} | {outcome} | {', '.join(shown[outcome, what])} |" for outcome, what in sorted(shown)]
    return "\n".join(["| a routed model and | is | shown by |", "|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    RESULTS.write_text(table(), encoding="utf-8")
    print(table())
