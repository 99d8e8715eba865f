"""A checkout that is not installed says so: strategies, methods and models are found through the installed package."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import diffes


def test_import_without_installation_says_what_to_do(tmp_path: Path) -> None:
    package = tmp_path / "diffes"
    package.mkdir()
    for name in ("__init__.py", "errors.py"):
        shutil.copy(Path(diffes.__file__).parent / name, package / name)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import diffes"
    # isolated and without site-packages: no installed package of any name is in sight
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError: diffes is not installed." in done.stderr and "pip install -e ." in done.stderr


def test_public_names_are_there_and_others_are_not() -> None:
    assert all(hasattr(diffes, name) for name in diffes.__all__)
    assert not hasattr(diffes, "no_such_name")
    assert diffes.__version__


def test_a_folder_of_the_same_name_beside_a_script_does_not_hide_the_package(tmp_path: Path) -> None:
    """For instance a clone: the script's folder comes first on the path, and a folder without `__init__.py` counts."""
    (tmp_path / "diffes").mkdir()
    (tmp_path / "script.py").write_text("import diffes; print(diffes.RunConfig().genes)")
    done = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "joint\n", done.stderr
