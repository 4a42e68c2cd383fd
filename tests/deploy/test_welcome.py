from __future__ import annotations

from PIL import Image

from foveate.deploy.welcome import SAMPLE_PICTURE, ready_line

MAX_ARGUMENT_BYTES = 128 * 1024


def test_the_ready_line() -> None:
    line = ready_line("http://127.0.0.1:9997", "foveate-demo", "cpu", "float32", 5.07)
    assert line == "Foveate is ready: http://127.0.0.1:9997 (model foveate-demo, cpu, float32, 5.1 s)"


def test_the_sample_picture_ships_and_fits_into_one_argument() -> None:
    with Image.open(SAMPLE_PICTURE) as picture:
        assert picture.format == "PNG"
    assert SAMPLE_PICTURE.stat().st_size * 4 / 3 < MAX_ARGUMENT_BYTES - 1024
