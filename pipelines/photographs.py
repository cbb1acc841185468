"""The photographs that lie inside the scikit-image and scikit-learn wheels, as files with captions; no download.

write_photographs(Path("out/photographs")) -> 14 pictures, each with a .txt beside it
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from sr_platform.errors import InputDataError

LICENCE = "public domain and CC0 (scikit-image); CC BY 2.0 (china, flower)"

_SKIMAGE, _SKLEARN = ("skimage", "data"), ("sklearn", "datasets/images")
_CAPTIONS = {
    (
        *_SKIMAGE,
        "astronaut.png",
    ): "A smiling astronaut with short blond hair in an orange space suit, her helmet beside "
    "her. A flag and a model of a space shuttle stand in the background.",
    (*_SKIMAGE, "brick.png"): "A brick wall in black and white. The joints between the long bricks are light gray.",
    (*_SKIMAGE, "camera.png"): "A man in a dark coat looks through a camera on a tripod on a lawn, in black and white.",
    (*_SKIMAGE, "chelsea.png"): "The face of a tabby cat with green eyes and long white whiskers, seen from close by.",
    (*_SKIMAGE, "coffee.png"): "A cup of espresso on a red saucer with a small spoon. It stands on a wooden table.",
    (*_SKIMAGE, "coins.png"): "Four rows of old Greek coins on a dark ground, in black and white.",
    (*_SKIMAGE, "grass.png"): "Grass and clover seen from above, in black and white. Dry blades lie across each other.",
    (*_SKIMAGE, "gravel.png"): "Gravel seen from above, in black and white. Small angular stones fill the picture.",
    (*_SKIMAGE, "hubble_deep_field.jpg"): "Many small coloured galaxies and stars on the black sky of deep space.",
    (*_SKIMAGE, "moon.png"): "The gray surface of the moon with small craters, in black and white.",
    (*_SKIMAGE, "motorcycle_left.png"): "A red motorcycle in a garage. Shelves with boxes stand behind it.",
    (*_SKIMAGE, "rocket.jpg"): "A white rocket on its launch pad at dusk between tall steel towers. Lamps shine at its "
    "foot.",
    (
        *_SKLEARN,
        "china.jpg",
    ): "A Chinese pagoda with three green and red roofs above trees. A lake lies behind it in haze.",
    (
        *_SKLEARN,
        "flower.jpg",
    ): "An orange dahlia in full bloom, seen from close by. The dark green background is blurred.",
}


def write_photographs(folder: Path) -> list[Path]:
    """Copies the photographs into `folder`, each with its caption as a .txt beside it; returns their paths.

    Raises:
        InputDataError: scikit-image or scikit-learn is not installed, or lies without its pictures.
    """
    sources = {_installed(*place): caption for place, caption in _CAPTIONS.items()}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for source, caption in sources.items():
        target = folder / source.name
        shutil.copyfile(source, target)
        target.with_suffix(".txt").write_text(caption + "\n")
        written.append(target)
    return written


def _installed(package: str, inside: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputDataError(f"photographs: {package} is not installed; pip install 'faithdiff-platform[demo]'")
    path = Path(spec.origin).parent / inside / name
    if not path.is_file():
        raise InputDataError(
            f"photographs: {path} is missing from the installed {package}; install another version of it"
        )
    return path
