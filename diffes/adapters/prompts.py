"""Prompts for text-to-image models: searches, calibration and reports draw from disjoint sets."""

from __future__ import annotations

import itertools
from pathlib import Path

from diffes.errors import DiffesError
from diffes.files import parse_json
from diffes.forms import Prompts, checked

PROMPTS = "prompts.json"
SPLITS = ("search", "heldout", "calibration")
FORM = 'expected JSON with lists "search" and "heldout", if wanted "calibration", of at least one prompt, none empty'

_SUBJECTS = {
    "search": (
        "an old fisherman mending a net", "a red bicycle leaning against a wall", "a bowl of ramen with a soft egg",
        "a lighthouse above a rocky shore", "a border collie running through grass", "a bottle with dried flowers",
        "a narrow street with market stalls", "a sailing boat in a harbour",
    ),
    "heldout": (
        "a girl reading under an apple tree", "a steam locomotive on a bridge", "a stack of pancakes with berries",
        "a castle on a hill", "a tabby cat asleep on a windowsill", "a brass telescope on a wooden desk",
        "a crowded city square", "a hot-air balloon over fields",
    ),
    "calibration": (
        "a potter shaping clay", "a yellow vintage car", "a loaf of bread on a board", "a village beside a lake",
        "an owl on a branch", "a violin in an open case", "a railway station hall", "a kayak on a calm river",
    ),
}  # fmt: skip
_STYLES = (
    "a photograph of {}", "an oil painting of {}", "a watercolour of {}", "{} at sunrise", "{} in heavy rain",
    "a close-up of {}, shallow depth of field", "{}, flat vector illustration", "a black and white picture of {}",
)  # fmt: skip


def default_prompts() -> dict[str, list[str]]:
    """Return 64 prompts a split, for models that come without their own. No subject is in two splits."""
    return {
        split: [style.format(subject) for style, subject in itertools.product(_STYLES, subjects)]
        for split, subjects in _SUBJECTS.items()
    }


def read_prompts(path: Path) -> dict[str, list[str]]:
    """Read the prompts of a JSON file with the lists `search`, `heldout` and, optionally, `calibration`.

    Raises:
        DiffesError: the file is not of that form, or a prompt is in two lists.
    """
    try:
        data = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DiffesError(f"{path} holds no prompts ({error}); {FORM}") from error
    found = checked(Prompts, data, path, FORM, "holds no prompts")
    prompts = {"search": found.search, "heldout": found.heldout, "calibration": found.calibration}
    for a, b in itertools.combinations(SPLITS, 2):
        if shared := sorted(set(prompts[a]) & set(prompts[b])):
            raise DiffesError(
                f"{path} has {shared[0]!r} in both {a!r} and {b!r}, which must not share prompts: remove it from one"
            )
    return prompts
