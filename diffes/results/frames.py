"""Results as pandas DataFrames, if pandas is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffes.errors import DiffesError


def dataframe(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return a pandas DataFrame of some rows.

    Raises:
        DiffesError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise DiffesError("to_dataframe needs pandas: pip install pandas, or read the CSV file") from error
    return pandas.DataFrame(rows)
