"""How long does it take to start? The least of several new Python processes each.

python benchmarks/start.py            # a minute
python benchmarks/start.py --smoke    # one process of each
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from diffes.config import RunConfig
from diffes.results.folder import config_record

RESULTS = Path(__file__).parent / "results"
AIMS = {"import diffes": 0.3, "diffes --help": 0.4}  # seconds
COMMAND = "import sys; sys.argv = {}; from diffes.cli import main; main()"
CODE = {
    "python alone": "pass",
    "import diffes": "import diffes",
    "diffes --help": COMMAND.format(["diffes", "--help"]),
    "diffes search --help": COMMAND.format(["diffes", "search", "--help"]),
    "import search_strategies.evolution": "import search_strategies.evolution",
    "import search_strategies.surrogate": "import search_strategies.surrogate",
}


def seconds(code: str, repeats: int) -> float:
    """The least of several new processes: whatever else the machine does only adds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    return min(times)


def table_of(found: dict[str, float]) -> str:
    """Markdown."""
    lines = ["| | seconds | aim |", "|---|---|---|"]
    lines += [f"| `{name}` | {taken:.2f} | {AIMS.get(name, '')} |" for name, taken in found.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="processes of each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="one of each, into runs/smoke")
    args = parser.parse_args()
    if args.smoke:
        args.repeats, args.out = 1, Path("runs/smoke") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    found = {name: seconds(code, args.repeats) for name, code in CODE.items()}
    data = {"seconds": found, "repeats": args.repeats, "versions": config_record(RunConfig())["versions"]}
    (args.out / "start.json").write_text(json.dumps(data, indent=1) + "\n")
    (args.out / "start.md").write_text(table_of(found))
    print(table_of(found))


if __name__ == "__main__":
    main()
