"""The examples of docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import diffes
import search_strategies
from diffes.progress import console


def _modules() -> list[str]:
    packages = [diffes, search_strategies]
    names = [info.name for each in packages for info in pkgutil.walk_packages(each.__path__, f"{each.__name__}.")]
    return [*(each.__name__ for each in packages), *names]


def _examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for name in _modules() for test in finder.find(importlib.import_module(name))]
    return [test for test in found if test.examples]


@pytest.mark.parametrize("example", _examples(), ids=lambda example: example.name)
def test_an_example_does_what_it_says(example: doctest.DocTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "quiet", True)  # bars are no part of what an example prints
    said: list[str] = []
    found = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert not found.failed, "".join(said)
