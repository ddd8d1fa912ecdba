"""What the first stage begins with: a tower, a language model and a fresh connector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from .config import Config
from .files import Stored, open_arrays, read_json
from .keys import entries
from .model import abstract
from .public_config import parsed
from .resampler import Resampler
from .weights import as_stored, check_arrays

CONNECTORS = {"group": ("groupresampler", 16), "naive": ("naiveresampler", 1)}
"""Their public names and numbers of groups."""
QUERIES, LAYERS = 512, 3

TOWER = "vision_tower._vision_tower."
LANGUAGE_MODEL = "language_model."
"""How keys begin that the checkpoints of the parts lack."""


def joined(
    tower: str | Path, language_model: str | Path, connector: str, seed: int, queries: int = QUERIES
) -> tuple[Config, dict[str, Stored]]:
    """The configuration, and the arrays of which a checkpoint of the whole would consist.

    Args:
        tower: a folder with SigLIP as on the hub; what it has for texts is not read.
        language_model: one with Qwen2 or Phi.
        connector: one of `CONNECTORS`, with random weights.
        seed: of these.
        queries: how many tokens it makes of a video.

    Raises:
        InputError: a folder is no such checkpoint; no weights have been read then.
    """
    tower, language_model = Path(tower), Path(language_model)
    described, text = (read_json(part / "config.json") for part in (tower, language_model))
    config = parsed(
        _description(described.get("vision_config", described), text, connector, queries)
    )
    stored = {
        TOWER + key: array
        for key, array in open_arrays(tower).items()
        if key.startswith("vision_model.")
    }
    stored |= {LANGUAGE_MODEL + key: array for key, array in open_arrays(language_model).items()}
    stored |= fresh_connector(config, seed)
    check_arrays(f"{tower} and {language_model}", config, stored)
    return config, stored


def _description(vision: Any, text: Any, connector: str, queries: int) -> dict[str, Any]:
    """What the `config.json` of the whole would say."""
    name, groups = CONNECTORS[connector]
    return {
        "model_type": "tinyllava",
        "connector_type": name,
        "group": groups,
        "num_queries": queries,
        "num_resampler_layers": LAYERS,
        "text_config": text,
        "vision_config": vision,
    }


def fresh_connector(config: Config, seed: int) -> dict[str, Stored]:
    """A connector of random weights, by its keys in a checkpoint."""
    sizes = config.resampler, config.vision.hidden_size, config.text.hidden_size
    leaves = nnx.to_flat_state(nnx.state(Resampler(*sizes, nnx.Rngs(seed))))
    wanted = entries(abstract(config))
    found = {}
    for path, leaf in leaves:
        entry = wanted["connector", *path]
        array = as_stored(jax.numpy.asarray(leaf[...], np.float32), entry)
        found[entry.key] = Stored(array.shape, "float32", array.__getitem__)
    return found
