"""Do diffusers' own fast tests of six pipelines pass with a schedule routed through every denoiser?

Every pipeline that the tests make gets a router (magnitude, three stages): all levels 0 ("dense"), 0 and H / 2 in turns
("alternating"), H / 2 everywhere ("half"). What fails there and passes untouched is listed, with what it said.

    git clone --depth 1 https://github.com/huggingface/diffusers CHECKOUT
    pip install parameterized requests-mock                  # which its tests need
    python benchmarks/diffusers_tests.py CHECKOUT            # tens of minutes
    python benchmarks/diffusers_tests.py CHECKOUT --smoke

With HF_HUB_OFFLINE=1 the tokenizers that the tests load from the hub are of single letters and of no words, and T5's
configuration is a small one; what else they load from there fails untouched too.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import string
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerFast, T5Config

from diffes.adapters import adapter_for
from diffes.pruning import make_method
from diffes.pruning.build import build_bank
from diffes.runtime.router import Router
from diffes.spaces.schedule import Schedule, Stages

RESULTS = Path(__file__).parent / "results"
FILES = {
    "DiTPipeline": "tests/pipelines/dit/test_dit.py",
    "StableDiffusionXLPipeline": "tests/pipelines/stable_diffusion_xl/test_stable_diffusion_xl.py",
    "StableDiffusionPipeline": "tests/pipelines/stable_diffusion/test_stable_diffusion.py",
    "PixArtAlphaPipeline": "tests/pipelines/pixart_alpha/test_pixart.py",
    "StableDiffusion3Pipeline": "tests/pipelines/stable_diffusion_3/test_pipeline_stable_diffusion_3.py",
    "FluxPipeline": "tests/pipelines/flux/test_pipeline_flux.py",
}
FAST = "FastTests or ((TestStableDiffusionPipeline or TestFluxPipeline) and not (Integration or Ckpt or DeviceMap))"
STAGES = Stages.equal(3)  # the tests' two steps are in the first and the second
LEVELS = {"dense": (0, 0, 0), "alternating": (0, 1, 0), "half": (1, 1, 1)}  # in halves of H
MODE, OUT = "DIFFES_ROUTED", "DIFFES_OUTCOMES"  # environment of the tests: a key of LEVELS or nothing; a file


def route(pipe: Any) -> None:
    """Routes the schedule of the environment through a new pipeline; one whose denoiser is routed stays as it is."""
    adapter = adapter_for(pipe)
    if all(pipe.components.get(name) is None for name in ("transformer", "unet")):  # made to encode prompts only
        return
    if hasattr(adapter.denoiser, "_routed_by_test"):
        return
    bank = build_bank(adapter, make_method("magnitude"), STAGES, None, guidance=2.0, seed=0, allocation="equal")
    router = Router(adapter, bank)
    levels = tuple(level * (router.max_level // 2) for level in LEVELS[os.environ[MODE]])
    router.install(Schedule(STAGES, levels, router.max_level))
    adapter.denoiser._routed_by_test = True


def letters(*_: Any, **__: Any) -> CLIPTokenizer:
    """Stands in for the tiny tokenizer of the tests."""
    ends = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate([*ends, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token="<|endoftext|>", model_max_length=77)


def words(*_: Any, **__: Any) -> PreTrainedTokenizerFast:
    """Stands in for T5's tokenizer: every word is unknown to it."""
    made = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=512, **ends)


def t5_config(*_: Any, **__: Any) -> T5Config:
    """Stands in for the configuration of a tiny T5."""
    return T5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)


def pytest_configure() -> None:
    """As a plug-in of pytest: every pipeline is routed once it is made."""
    stand_ins = ((CLIPTokenizer, letters), (AutoTokenizer, words), (AutoConfig, t5_config))
    for loaded, stand_in in stand_ins if os.environ.get("HF_HUB_OFFLINE") else ():

        def found(
            path: Any, *args: Any, _own: Any = loaded.from_pretrained, _other: Any = stand_in, **kwargs: Any
        ) -> Any:
            return (_own if Path(path).exists() else _other)(path, *args, **kwargs)

        loaded.from_pretrained = found
    for name in FILES:
        made: Any = getattr(diffusers, name)
        own = made.__init__

        def routed(self: Any, *args: Any, _own: Any = own, _made: Any = made, **kwargs: Any) -> None:
            _own(self, *args, **kwargs)
            if os.environ.get(MODE) and type(self) is _made:
                route(self)

        vars(routed)["__signature__"] = inspect.signature(own)  # diffusers reads which components there are
        made.__init__ = routed


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """As a plug-in of pytest: notes outcomes, and what was raised."""
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        line = {"test": report.nodeid, "outcome": report.outcome, "said": getattr(crash, "message", "")}
        with Path(os.environ[OUT]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def outcomes(checkout: Path, mode: str, only: str) -> dict[str, tuple[str, str]]:
    """Outcome of each test of all files, and what it said."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcomes.jsonl"
        out.touch()
        paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, MODE: mode, OUT: str(out), "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", Path(__file__).stem, *FILES.values(), "-k", only]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
        lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return {line["test"]: (line["outcome"], line["said"]) for line in lines}


def report(checkout: Path, modes: Sequence[str], only: str) -> str:
    """Counts of all pipelines and these schedules, and the differences, in Markdown."""
    counts = ["| pipeline | schedule | passed | skipped | failed | as untouched |", "|---|---|---|---|---|---|"]
    differences = ["| test | schedule | said |", "|---|---|---|"]
    untouched = outcomes(checkout, "", only)
    for mode in ("", *modes):
        found = outcomes(checkout, mode, only) if mode else untouched
        for pipeline, path in FILES.items():
            tests = sorted(test for test in untouched if test.startswith(path))
            n = Counter(found.get(test, ("lost", ""))[0] for test in tests)
            other = [test for test in tests if found.get(test, ("lost", ""))[0] != untouched[test][0]]
            counts.append(
                f"| {pipeline} | {mode or 'none'} | {n['passed']} | {n['skipped']} | {n['failed']} "
                f"| {len(tests) - len(other)} of {len(tests)} |"
            )
            for test in other:
                said = " ".join(found.get(test, ("lost", "not run"))[1].split())[:200].replace("|", "\\|")
                differences.append(f"| `{test.split('::', 1)[1]}` | {mode} | {said} |")
    failed = [f"- `{test.split('::', 1)[1]}`" for test, (outcome, _) in untouched.items() if outcome == "failed"]
    offline = "; without the hub" if os.environ.get("HF_HUB_OFFLINE") else ""
    versions = f"diffusers {diffusers.__version__}{offline}."
    reasons = (
        "A `DiffesError` is a model that cannot be cut, refused; an `AssertionError` where images are compared with "
        "recorded ones is that of a model that is thin."
    )
    sections = [
        versions,
        "",
        *counts,
        "",
        "Differences:",
        "",
        reasons,
        "",
        *differences,
        "",
        "Failed untouched:",
        "",
        *failed,
    ]
    return "\n".join(sections) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", default=FAST, help="of pytest's -k")
    parser.add_argument("--schedules", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.only = "DiTPipelineFastTests and test_inference_batch_consistent"
        args.out = Path("runs/smoke") if args.out == RESULTS else args.out
    text = report(args.checkout, ["half"] if args.smoke else args.schedules, args.only)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "diffusers_tests.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
