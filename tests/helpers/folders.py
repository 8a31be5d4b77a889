"""Image folders drawn on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def draw_folder(root: Path, classes: int, images: int, size: int | tuple[int, int] = 12,
                splits: tuple[str, ...] = ("train", "test"), seed: int = 0) -> Path:
    """An image folder whose classes differ in colour, so that a network can learn them; size is one side, or (H, W)."""
    height, width = (size, size) if isinstance(size, int) else size
    generator = np.random.default_rng(seed)
    for split in splits:
        for label in range(classes):
            folder = root / split / f"class_{label:03d}"
            folder.mkdir(parents=True)
            colour = np.array([label * 37 % 256, label * 101 % 256, label * 173 % 256])
            for index in range(images):
                noise = generator.integers(-30, 30, (height, width, 3))
                pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root
