"""What runs the commands: other libraries are kept off the terminal, and a log file takes what happened."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from diffes import terminal
from diffes.errors import DiffesError
from diffes.progress import RichProgress

ROOT = Path(__file__).parents[1]
NOISY = """
import logging, warnings
from diffes import terminal
with terminal.session():
    logging.getLogger("library").warning("Failed to load a kernel")
    warnings.warn("deprecated")
    from diffes.measure.metrics import make_metric
    make_metric("ssim", "cpu")
    from peft import LoraConfig
"""


@pytest.mark.slow
def test_what_other_libraries_say_is_not_shown() -> None:
    done = subprocess.run([sys.executable, "-c", NOISY], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "Failed" not in done.stdout and "deprecated" not in done.stdout


def test_a_log_file_takes_parts_warnings_and_errors_and_is_added_to(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    for part in ("first", "second"):
        with terminal.session(path), RichProgress().task(part, 1) as advance:
            logging.getLogger("library").warning("no kernel")
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("deprecated", stacklevel=1)
            advance("")
    with pytest.raises(DiffesError), terminal.session(path):
        raise DiffesError("stages must be at least 1")
    with pytest.raises(RuntimeError), terminal.session(path):
        raise RuntimeError("a fault")
    text = path.read_text()
    assert text.index("first: begins") < text.index("first: done") < text.index("second: begins")
    assert text.count("WARNING library: no kernel") == 2 and text.count("deprecated") >= 2
    assert "DiffesError: stages must be at least 1" in text
    assert text.count("Traceback") == 1  # a user's mistake needs none
    logging.getLogger("library").warning("afterwards")
    assert "afterwards" not in path.read_text()


def test_a_log_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffesError, match=r"--log-file .* cannot be written"), terminal.session(tmp_path):
        pass
