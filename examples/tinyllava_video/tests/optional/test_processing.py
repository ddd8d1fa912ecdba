"""What the tower reads is what SigLIP's own processor makes of the frames."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import SiglipImageProcessor

from examples.tinyllava_video.video import preprocess


@pytest.mark.parametrize("shape", [(37, 53), (480, 270), (384, 384), (20, 700)])
def test_as_siglip_image_processor(shape: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, *shape, 3)).astype(np.uint8)
    processor = SiglipImageProcessor(size={"height": 384, "width": 384})
    expected = processor(list(frames), return_tensors="np")["pixel_values"]
    found = preprocess(frames, 384).transpose(0, 3, 1, 2)
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-7, rtol=0)


def test_defaults_are_those_of_so400m() -> None:
    """Its preprocessor_config.json says no more than what the class does by itself."""
    processor = SiglipImageProcessor()
    assert (processor.resample, processor.image_mean, processor.image_std) == (
        3,
        [0.5] * 3,
        [0.5] * 3,
    )
    assert processor.rescale_factor == 1 / 255
