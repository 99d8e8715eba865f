"""How many mutants of the code do the tests kill?

A mutant is the code with one small fault, by an operator of `mutation_operators.py` or from the table of
`mutation_aimed.py`. Of all that the operators can do to the chosen modules a seeded sample is drawn, every mutant as
likely as any other; the table's are added and counted apart. Each runs in a clean copy of the tree against the fast
tests that belong to its module, nearest first, until one fails or the time is up. `--check` runs the same tests on the
code as it is: where they fail there, every mutant would count as killed.

Finished mutants are lines of `mutation_testing.jsonl` and are not run again. Those of a module whose code has changed
since count as new. To run survivors again after tests were added, delete their lines or choose another `--out`.

    python benchmarks/mutation_testing.py --check               # first
    python benchmarks/mutation_testing.py --jobs 2              # 100 mutants; killed ones take about 10 seconds each,
                                                                # survivors as long as all tests of the module
    python benchmarks/mutation_testing.py --n 20 --modules diffes/pruning diffes/spaces/loop.py
    python benchmarks/mutation_testing.py --smoke               # a drawn and an aimed mutant, into runs/smoke

Needs `pip install cosmic-ray`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from mutation_aimed import AIMED
from mutation_operators import Mutation, mutate, mutations

NAME = "mutation_testing"
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
MODULES = ("diffes/spaces", "diffes/pruning", "diffes/runtime", "diffes/measure", "search_strategies")
WRONG_COPY = 97  # exit status of RUNNER
STOP = threading.Event()  # set when all that runs must end

# Runs pytest where it stands, and looks where the code came from. Slow tests run for the first N tests, its first
# argument.
RUNNER = f"""
import pathlib, sys
import pytest


class Chosen:
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        whole = [pathlib.Path(test.split("::")[0]).resolve() for test in sys.argv[2:][:int(sys.argv[1])]]

        def wanted(item):
            return any(item.path.is_relative_to(path) for path in whole) or not item.get_closest_marker("slow")

        config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
        items[:] = [item for item in items if wanted(item)]


code = pytest.main(sys.argv[2:], plugins=[Chosen()])
packages = ("diffes", "search_strategies")
files = [m.__file__ for n, m in list(sys.modules.items()) if n.split(".")[0] in packages and m.__file__]
here = pathlib.Path.cwd().resolve()
sys.exit(code if all(pathlib.Path(file).resolve().is_relative_to(here) for file in files) else {WRONG_COPY})
"""


class Mutant(NamedTuple):
    """One fault in one module."""

    id: str  # from the module's code and the mutation; it changes whenever the code of the module does
    file: str
    line: int
    operator: str  # "aimed" for one from the table
    source: str
    diff: tuple[str, ...]
    tests: tuple[str, ...]  # what to run, in this order


def digest(*parts: object) -> str:
    """Twelve hexadecimal digits."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:12]


def code_digest(source: str) -> str:
    """Of what the module does: comments and layout do not count."""
    return digest(ast.dump(ast.parse(source)))


def difference(old: str, new: str) -> tuple[str, ...]:
    """Removed and added lines."""
    lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm=""))
    return tuple(line for line in lines[2:] if not line.startswith("@@"))


def tests_of(tree: Path, module: str) -> tuple[str, ...]:
    """Test files that belong to a module, nearest first: its own, those of its package, those that use it."""
    package, *folders, name = Path(module).parts
    strategies = package == "search_strategies"
    folder = "/".join(("tests", *((package,) if strategies else ()), *folders))
    users = ["tests/spaces/test_*.py"] if strategies else ["tests/test_cli.py", "tests/study/test_*.py"]
    patterns = [f"{folder}/test_{name}", f"{folder}/test_*.py", *users]
    files = [path for pattern in patterns for path in sorted(tree.glob(pattern))]
    return tuple(dict.fromkeys(path.relative_to(tree).as_posix() for path in files))


def places(file: str, source: str) -> Iterator[tuple[tuple[object, ...], Mutation]]:
    """All mutations of a module, each with a name for its place that outlives edits elsewhere in the module."""
    lines = source.splitlines()
    alike: Counter[tuple[str, str, int]] = Counter()
    for mutation in mutations(source):
        text = lines[mutation.line - 1]
        key = mutation.operator, text.strip(), mutation.column - len(text) + len(text.lstrip())
        yield (file, *key, alike[key]), mutation
        alike[key] += 1


def sample(tree: Path, files: Sequence[str], n: int, seed: int) -> tuple[list[Mutant], int]:
    """`n` mutants of the modules, and of how many they were drawn.

    A larger sample contains the smaller ones. After an edit, a sample has the same mutants in all places that the edit
    left as they were, since their rank hangs on the seed and the place alone.
    """
    sources = {file: (tree / file).read_text() for file in files}
    found = [(file, *place) for file in files for place in places(file, sources[file])]
    chosen: dict[tuple[str, str], Mutant] = {}
    for file, place, mutation in sorted(found, key=lambda x: digest(seed, *x[1])):
        if len(chosen) == n:
            break
        source = sources[file]
        mutated = mutate(source, mutation)
        try:
            key = file, code_digest(mutated)
        except SyntaxError:
            continue
        if key in chosen or key[1] == code_digest(source):  # two operators can make the same mutant
            continue
        name = digest(code_digest(source), *place)
        diff = difference(source, mutated)
        chosen[key] = Mutant(name, file, mutation.line, mutation.operator, mutated, diff, tests_of(tree, file))
    return list(chosen.values()), len(found)


def aimed(tree: Path, files: Sequence[str] | None) -> list[Mutant]:
    """The mutants of the table, or those of some modules."""
    mutants = []
    for file, old, new, tests in AIMED:
        if files is not None and file not in files:
            continue
        source = (tree / file).read_text() if (tree / file).exists() else ""
        missing = [test for test in tests if not (tree / test.split("::")[0]).exists()]
        if source.count(old) != 1 or missing:
            raise SystemExit(f"mutation_aimed.py: {file} has {source.count(old)} times {old!r}; no tests: {missing}")
        mutated, line = source.replace(old, new), source[: source.index(old)].count("\n") + 1
        name = digest(code_digest(source), file, old, new)
        diff = difference(source, mutated)
        mutants.append(Mutant(name, file, line, "aimed", mutated, diff, tests or tests_of(tree, file)))
    return mutants


def snapshot(target: Path) -> None:
    """Copies what git has and does not ignore, as it is now; later edits touch no mutant."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(
    tree: Path, tests: Sequence[str], options: Sequence[str], timeout: float, file: str = "", source: str = "",
    whole: bool = False,
) -> tuple[int, str]:  # fmt: skip
    """Exit status of pytest and what it printed, in a copy of the tree where `file` reads `source`.

    Slow tests run where they are the module's own: those of the first file, or of all files that a table names.
    """
    with tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True) as folder:
        copy, log = Path(folder) / "tree", Path(folder) / "log"
        shutil.copytree(tree, copy)
        if file:
            (copy / file).write_text(source)
        pytest = [*tests, "-q", "-p", "no:cacheprovider", f"--basetemp={folder}/pytest", *options]
        env = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        # a copy has a path of its own, so only the bytecode of other packages is shared
        env |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tree.parent / "bytecode")}
        with log.open("w") as output:
            pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            own = len(tests) if whole else 1
            command = [sys.executable, "-c", RUNNER, str(own), *pytest]
            child = subprocess.Popen(command, cwd=copy, env=env, start_new_session=True, **pipes)
        end = time.monotonic() + timeout
        while child.poll() is None and time.monotonic() < end and not STOP.is_set():
            time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):  # the group outlives its leader where a test left something
            os.killpg(child.pid, signal.SIGKILL)
        status, text = child.wait(), log.read_text(errors="replace")
    if status == WRONG_COPY:
        raise SystemExit(f"the tests imported {ROOT.name} and not the copy of it")
    return status, text.replace(f"{copy}/", "").replace(folder, "")


def result(tree: Path, mutant: Mutant, timeout: float) -> dict[str, Any]:
    """A line of the results file."""
    start = time.perf_counter()
    status, text = run_tests(
        tree, mutant.tests, ["-x"], timeout, mutant.file, mutant.source, whole=mutant.operator == "aimed"
    )
    seconds = time.perf_counter() - start
    found = outcome(status, text, seconds > timeout)
    if found == "error":
        print(text[-3000:], flush=True)
    first = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    by = first[1] if first and found == "killed" else None
    known = {"id": mutant.id, "file": mutant.file, "line": mutant.line, "operator": mutant.operator}
    return known | {"outcome": found, "by": by, "diff": mutant.diff, "seconds": round(seconds, 1)}


def outcome(status: int, text: str, late: bool) -> str:
    """ "killed", "timeout" (killed too), "survived", or "error" where the tests could not be run."""
    if status == -signal.SIGKILL and late:
        return "timeout"
    if status == 0:
        return "survived"
    failed = status in (1, 2) or status < 0  # a test failed, a test file could not be imported, the process crashed
    return "killed" if failed or "ImportError while loading conftest" in text else "error"


def run_all(tree: Path, mutants: Sequence[Mutant], timeout: float, jobs: int, path: Path) -> dict[str, dict[str, Any]]:
    """Results by id, of the file and of the mutants that are not in it; each is written as it comes."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {row["id"]: row for row in rows if row["outcome"] != "error"}
    left = [mutant for mutant in mutants if mutant.id not in known]
    with ThreadPoolExecutor(jobs) as pool:
        try:
            futures = [pool.submit(result, tree, mutant, timeout) for mutant in left]
            for i, future in enumerate(as_completed(futures), 1):
                row = future.result()
                known[row["id"]] = row
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                what = f"{row['outcome']:8} {row['seconds']:6.1f} s  {row['file']}:{row['line']}  {row['operator']}"
                print(f"[{i}/{len(left)}] {what}", flush=True)
        except KeyboardInterrupt:
            raise SystemExit("interrupted: the same command goes on from here") from None
        finally:
            STOP.set()
            pool.shutdown(cancel_futures=True)
    return known


def interval(killed: int, total: int) -> str:
    """95 % interval (Wilson) of the share of all mutants that would be killed."""
    z, p = 1.96, killed / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return f"{max(0.0, middle - half):.0%} to {min(1.0, middle + half):.0%}"


def report(rows: Sequence[dict[str, Any]], population: int, seed: int) -> str:
    """Markdown: killed by folder, and the survivors."""
    errors = sum(row["outcome"] == "error" for row in rows)
    rows = [row for row in rows if row["outcome"] != "error"]
    drawn = [row for row in rows if row["operator"] != "aimed"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(drawn, key=lambda row: str(row["file"])):
        groups.setdefault(f"`{Path(row['file']).parent}`", []).append(row)
    groups |= {"**all drawn**": drawn, "**aimed**": [row for row in rows if row["operator"] == "aimed"]}
    uncounted = f" Of {errors} others the tests could not be run." if errors else ""
    lines = [f"{len(drawn)} mutants drawn from {population} with seed {seed}.{uncounted}", ""]
    lines += ["| folder | killed / total | of these by timeout | share | 95 % interval |", "|---|---|---|---|---|"]
    for name, group in groups.items():
        counts = Counter(row["outcome"] for row in group)
        killed, total = counts["killed"] + counts["timeout"], len(group)
        if group:
            between = interval(killed, total) if group is drawn else ""
            lines.append(f"| {name} | {killed} / {total} | {counts['timeout']} | {killed / total:.0%} | {between} |")
    survivors = [row for row in rows if row["outcome"] == "survived"]
    lines += ["", "Survivors:" if survivors else "No survivors.", ""]
    for row in sorted(survivors, key=lambda row: (row["file"], row["line"])):
        diff = "\n".join(f"  {line}" for line in row["diff"])
        lines += [f"- `{row['file']}:{row['line']}` ({row['operator']})", "", f"  ```diff\n{diff}\n  ```", ""]
    return "\n".join(lines).rstrip() + "\n"


def chosen_files(tree: Path, modules: Sequence[str]) -> list[str]:
    """Python files of the modules, which may be folders."""
    found = {m: [tree / m] if (tree / m).is_file() else sorted((tree / m).rglob("*.py")) for m in modules}
    if wrong := [module for module in modules if not found[module]]:
        raise SystemExit(f"no modules: {wrong}; pass files or folders relative to the repository")
    return list(dict.fromkeys(path.relative_to(tree).as_posix() for paths in found.values() for path in paths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100, help="how many mutants to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="+", help=f"files or folders; default {' '.join(MODULES)}")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for the tests of one mutant")
    parser.add_argument("--check", action="store_true", help="run the tests on the code as it is, and no mutant")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="two mutants, into runs/smoke")
    args = parser.parse_args()
    if args.smoke:
        args.n, args.modules, args.timeout = 1, ["diffes/spaces/schedule.py"], 25
        args.out = Path("runs/smoke") if args.out == RESULTS else args.out
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's background job would ignore it
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder) / "tree"
        snapshot(tree)
        drawn, population = sample(tree, chosen_files(tree, args.modules or MODULES), args.n, args.seed)
        mutants = aimed(tree, chosen_files(tree, args.modules) if args.modules else None) + drawn
        if args.check:
            tests = sorted({test for mutant in mutants for test in mutant.tests})
            status, text = run_tests(tree, tests, ["--durations=10"], math.inf)
            print(text)
            raise SystemExit(status)
        args.out.mkdir(parents=True, exist_ok=True)
        rows = run_all(tree, mutants, args.timeout, args.jobs, args.out / f"{NAME}.jsonl")
    text = report([rows[mutant.id] for mutant in mutants], population, args.seed)
    (args.out / f"{NAME}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
