"""``images/DIGEST.png``: the images of a run's prompts as people see them, named by their SHA-256.

They are previews, made of decoded pixels. What a data set brings along is not copied, so a viewer
may show them.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from kimi_core.models.images import preview
from kimi_core.models.vision import Images

FOLDER = "images"

SAMPLED = re.compile(rf"^--- (\d+):|^image ({FOLDER}/[0-9a-f]{{64}}\.png)$", re.MULTILINE)
"""The lines of ``samples/*.txt`` that begin a sample or name an image. Texts of a model stand
behind bars, so none of their lines looks like these."""


def preview_path(digest: str) -> str:
    """Where a run keeps the preview of the image with this SHA-256, in its folder."""
    return f"{FOLDER}/{digest}.png"


def sampled_previews(text: str) -> Iterator[tuple[int, int, str]]:
    """(sample, image, path) of each image in ``samples/*.txt``, both counted from 1."""
    sample, found = 0, Counter[int]()
    for line in SAMPLED.finditer(text):
        if line[1]:
            sample = int(line[1])
        else:
            found[sample] += 1
            yield sample, found[sample], line[2]


class Previews:
    """Writes the previews of a run, each once.

    Args:
        run: the run folder.
        images: the run's images; None: nothing is written.
    """

    def __init__(self, run: Path, images: Images | None) -> None:
        self._run, self._images = run, images
        self._there = {path.stem for path in (run / FOLDER).glob("*.png")}

    def write(self, digests: Iterable[str]) -> None:
        """Write the previews that are not there yet.

        An image whose file has changed has none: the run does not stop for it here. The files are
        not forced to disk.

        Raises:
            OSError: the disk is full or has another fault.
        """
        for digest in dict.fromkeys(digests):
            image = None if self._images is None else self._images.image(digest)
            if image is None or digest in self._there:
                continue
            self._there.add(digest)
            path = self._run / preview_path(digest)
            path.parent.mkdir(exist_ok=True)
            with suppress(ValueError):
                partial = path.with_name(path.name + ".tmp")
                partial.write_bytes(preview(image))
                partial.replace(path)
