"""Real photos for tests: crops of the photographs that scikit-image ships."""

import importlib.util
from pathlib import Path

import pytest
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

NAMES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "coins.png",
)


def photo_crops(n: int, *, size: int = 56) -> Tensor:
    """Preprocessed images [n, 3, size, size]: square crops of half to all of a photo, seeded."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs photos: pip install scikit-image")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    photos = [Image.open(folder / name).convert("RGB") for name in NAMES]
    source = torch.Generator().manual_seed(0)
    images = []
    for i in range(n):
        photo = photos[i % len(photos)]
        share, left, top = torch.rand(3, generator=source).tolist()
        side = int(min(photo.size) * (0.5 + 0.5 * share))
        x, y = int(left * (photo.width - side)), int(top * (photo.height - side))
        crop = F.resize(photo.crop((x, y, x + side, y + side)), [size, size])
        images.append(F.normalize(F.to_tensor(crop), OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return torch.stack(images)
