"""The world that `emoji-sdxl` draws: one emoji at a size and place on a coloured background, with its caption.

A prompt is an (object, background, layout) triple. Every fifth (object, background) pair is never shown in training:
prompts of those pairs are the held-out ones. Sprites are rendered from the Noto colour emoji font (OFL-1.1, artwork
Apache-2.0), e.g. from Debian's package `fonts-noto-color-emoji`.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SIZE = 32  # pixels of a scene's side
OBJECTS = {
    "cat": "🐱", "pig": "🐷", "frog": "🐸", "monkey": "🐵", "panda": "🐼", "fox": "🦊", "fish": "🐟", "turtle": "🐢",
    "ladybug": "🐞", "sunflower": "🌻", "rose": "🌹", "tree": "🌲", "cactus": "🌵", "mushroom": "🍄", "apple": "🍎",
    "banana": "🍌", "grapes": "🍇", "strawberry": "🍓", "watermelon": "🍉", "lemon": "🍋", "pineapple": "🍍",
    "carrot": "🥕", "pizza": "🍕", "burger": "🍔", "donut": "🍩", "coffee": "☕", "football": "⚽", "basketball": "🏀",
    "balloon": "🎈", "gift": "🎁", "car": "🚗", "rocket": "🚀", "house": "🏠", "key": "🔑", "umbrella": "☂️",
    "crown": "👑", "star": "⭐", "moon": "🌙", "heart": "❤️", "ghost": "👻",
}  # fmt: skip
BACKGROUNDS = {
    "red": (196, 60, 60), "orange": (236, 146, 62), "yellow": (244, 222, 110), "green": (92, 168, 92),
    "blue": (72, 112, 200), "purple": (142, 92, 180), "white": (240, 240, 240), "black": (36, 36, 36),
}  # fmt: skip
LAYOUTS = {  # centre of the emoji as fractions of the side, and its size in pixels
    "big": (0.5, 0.5, 27), "left": (0.28, 0.5, 17), "right": (0.72, 0.5, 17), "top": (0.5, 0.28, 17),
    "bottom": (0.5, 0.72, 17),
}  # fmt: skip
Scene = tuple[str, str, str]  # object, background, layout


def caption(scene: Scene) -> str:
    """The prompt of a scene."""
    thing, background, layout = scene
    if layout == "big":
        return f"a big {thing} on a {background} background"
    return f"a small {thing} at the {layout} of a {background} background"


def splits() -> tuple[list[Scene], list[Scene]]:
    """Scenes for training, and those of the (object, background) pairs that training never sees."""
    seen: list[Scene] = []
    unseen: list[Scene] = []
    for (i, thing), (j, background) in itertools.product(enumerate(OBJECTS), enumerate(BACKGROUNDS)):
        # 3 and 5 have no factor in common: each object misses one or two backgrounds, each background eight objects
        target = unseen if (i + 3 * j) % 5 == 0 else seen
        target += [(thing, background, layout) for layout in LAYOUTS]
    return seen, unseen


def sprites(font: Path) -> dict[str, Image.Image]:
    """Square RGBA pictures of all objects, as large as the font has them."""
    if not font.exists():
        raise SystemExit(f"{font} is missing: install Debian's fonts-noto-color-emoji or pass --font")
    typeface = ImageFont.truetype(font, 109)  # the one size the font's bitmaps have
    pictures = {}
    for name, emoji in OBJECTS.items():
        glyph = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(glyph).text((0, 0), emoji, font=typeface, embedded_color=True)
        glyph = glyph.crop(glyph.getbbox())
        side = max(glyph.size)
        pictures[name] = Image.new("RGBA", (side, side))
        pictures[name].paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return pictures


class Painter:
    """Draws scenes; resized sprites are kept."""

    def __init__(self, font: Path) -> None:
        self._sprites = sprites(font)
        self._resized: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    def paint(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """One scene (3, 32, 32) uint8; place, size and background colour vary a little from draw to draw."""
        thing, background, layout = scene
        x, y, size = LAYOUTS[layout]
        size += int(rng.integers(-1, 2))
        colour, alpha = self._sprite(thing, size)
        shade = np.clip(np.array(BACKGROUNDS[background]) + rng.integers(-12, 13, 3), 0, 255)
        canvas = np.broadcast_to(shade[:, None, None], (3, SIZE, SIZE)).astype(np.float32).copy()
        left, top = (round(at * SIZE - size / 2) + int(rng.integers(-1, 2)) for at in (x, y))
        left, top = (min(max(edge, 0), SIZE - size) for edge in (left, top))
        window = canvas[:, top : top + size, left : left + size]
        window += alpha * (colour - window)
        return canvas.round().astype(np.uint8)

    def _sprite(self, thing: str, size: int) -> tuple[np.ndarray, np.ndarray]:
        if (thing, size) not in self._resized:
            pixels = np.asarray(self._sprites[thing].resize((size, size), Image.Resampling.LANCZOS), dtype=np.float32)
            self._resized[thing, size] = pixels[:, :, :3].transpose(2, 0, 1), pixels[:, :, 3] / 255
        return self._resized[thing, size]


def compose(scenes: list[Scene], n: int, font: Path, seed: int) -> tuple[np.ndarray, list[Scene]]:
    """`n` pictures (n, 3, 32, 32) uint8 of `scenes`, which take turns, and the scene of each."""
    painter, rng = Painter(font), np.random.default_rng(seed)
    chosen: list[Scene] = []
    while len(chosen) < n:
        chosen += [scenes[i] for i in rng.permutation(len(scenes))]
    chosen = chosen[:n]
    return np.stack([painter.paint(scene, rng) for scene in chosen]), chosen
