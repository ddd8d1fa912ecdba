"""What the first stage of training leaves: a folder for each part, with files of PyTorch."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path as FilePath

from flax import nnx

from .errors import InputError
from .files import PARTS, TORCH, write_json
from .keys import entries
from .model import TinyLlavaVideo
from .public_config import config_dict
from .torch_files import write_torch
from .weights import as_stored, check_destination, copy_others

CONFIGS = {"vision_tower": "vision_config", "language_model": "text_config"}


def check_parts() -> None:
    """Whether such folders can be written.

    Raises:
        InputError: PyTorch is missing.
    """
    if find_spec("torch") is None:
        raise InputError("output: the folders of stage 1 need PyTorch; `pip install torch`")


def save_parts(
    model: TinyLlavaVideo, directory: str | FilePath, *, source: str | FilePath | None = None
) -> None:
    """Writes the model as the public code writes it after the first stage.

    Args:
        model: its parameters may be folded, and on many devices.
        directory: is made if need be; there must be no weights in it.
        source: the checkpoint that the model comes from; everything in it but weights is copied.

    Raises:
        InputError: there are weights already, PyTorch is missing, or the format cannot express the
            configuration.
    """
    check_parts()
    check_destination(directory, model.config, source)
    directory, described = FilePath(directory), config_dict(model.config)
    leaves = dict(nnx.to_flat_state(nnx.state(model)))
    wanted = {e.key: partial(as_stored, leaves[path][...], e) for path, e in entries(model).items()}
    for part, prefix in PARTS.items():
        (directory / part).mkdir(parents=True, exist_ok=True)
        held = {k.removeprefix(prefix): read for k, read in wanted.items() if k.startswith(prefix)}
        write_torch(directory / part / TORCH, held)
        if part in CONFIGS:
            write_json(directory / part / "config.json", described[CONFIGS[part]])
    if source is None:
        write_json(directory / "config.json", described)
    else:
        copy_others(FilePath(source), directory)
