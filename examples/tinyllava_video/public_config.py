"""The public `config.json`, both ways."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from .config import (
    CONFIGS,
    Config,
    PhiConfig,
    Positions,
    Qwen2Config,
    ResamplerConfig,
    SiglipConfig,
    variant,
)
from .errors import InputError
from .files import read_json

T = TypeVar("T", SiglipConfig, Qwen2Config, PhiConfig)


@dataclass(frozen=True)
class PublicClass(Generic[T]):
    """A class of `transformers`: what stands for fields that it does not write down.

    `only` has the values of other fields that this model implements, the default first.
    """

    own: type[T]
    defaults: dict[str, Any]
    only: dict[str, tuple[Any, ...]]


SIGLIP = PublicClass(
    SiglipConfig,
    {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    },
    {
        "model_type": ("siglip_vision_model",),
        "hidden_act": ("gelu_pytorch_tanh",),
        "num_channels": (3,),
        "vision_use_head": (True,),
    },
)
QWEN2 = PublicClass(
    Qwen2Config,
    {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
    },
    {"hidden_act": ("silu",), "use_sliding_window": (False,)},
)
PHI = PublicClass(
    PhiConfig,
    {
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "layer_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False,
    },
    {"hidden_act": ("gelu_new", "gelu_pytorch_tanh"), "qk_layernorm": (False,)},
)
TEXT: dict[str, PublicClass[Any]] = {"qwen2": QWEN2, "phi": PHI}
CONNECTORS: dict[str, Positions] = {
    "groupresampler": "queries",
    "naiveresampler": "media",
    "resamplerwithpe": "media",  # its name until March 2025
    "resampler": "none",
}
"""Types of connector, and what their positions are added to; only the first has groups."""
STRATEGIES = {"patch": True, "cls_patch": False}
"""Choices of features, and whether the first token is dropped."""

OWN = "jax_lnfold"
"""Under this name stands what the public format has no fields for."""
OWN_FIELDS = ("num_frames", "max_frames")
OWN_RESAMPLER_FIELDS = ("num_heads", "head_dim", "position_dtype")
OWN_TOWER_FIELDS = ("feature_norm",)
TOP_DEFAULTS = {
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "patch",
    "tokenizer_model_max_length": 2048,
    OWN: {},
}


def config_from(directory: str | Path) -> Config:
    """The configuration in a checkpoint's `config.json`.

    That file does not say how frames are sampled: `num_frames` and `max_frames` are those of the
    named configuration that is otherwise the same, or else the defaults.

    Raises:
        InputError: there is no such file, a field is missing, or it describes another model.
    """
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise InputError(
            f"directory: {file} does not exist; give the folder of a TinyLLaVA-Video checkpoint"
        )
    try:
        return parsed(read_json(file))
    except InputError as error:
        raise InputError(f"{error}; it was read from {file}") from None


def config_dict(config: Config) -> dict[str, Any]:
    """What `config.json` says about this model."""
    vision, resampler, text = asdict(config.vision), config.resampler, asdict(config.text)
    if resampler.groups > 1 and resampler.positions != "queries":
        raise InputError(
            f"config: {resampler.groups} groups with positions={resampler.positions!r} have no "
            "public format; the one with groups has positions='queries'"
        )
    own = {name: getattr(config, name) for name in OWN_FIELDS}
    own |= {name: getattr(resampler, name) for name in OWN_RESAMPLER_FIELDS}
    own |= {name: vision.pop(name) for name in OWN_TOWER_FIELDS}
    strategies = {drops: name for name, drops in STRATEGIES.items()}
    connector = next(name for name, to in CONNECTORS.items() if to == resampler.positions)
    name = variant(config)
    text |= {"model_type": name, "hidden_act": TEXT[name].only["hidden_act"][0]}
    vision |= {field: allowed[0] for field, allowed in SIGLIP.only.items()}
    return {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "connector_type": connector,
        "num_queries": resampler.num_queries,
        "group": resampler.groups,
        "num_resampler_layers": resampler.num_layers,
        "hidden_size": config.text.hidden_size,
        "vocab_size": config.text.vocab_size,
        "vision_hidden_size": config.vision.hidden_size,
        "vision_feature_layer": vision.pop("feature_layer"),
        "vision_feature_select_strategy": strategies[vision.pop("drop_first_token")],
        "tokenizer_model_max_length": config.context,
        "text_config": text,
        "vision_config": vision,
        OWN: own,
    }


def parsed(given: dict[str, Any]) -> Config:
    """The configuration that the contents of a `config.json` describe.

    Raises:
        InputError: a field is missing, or it describes another model.
    """
    given = TOP_DEFAULTS | given
    _one_of(given, "model_type", ("tinyllava",))
    own, text, vision = (_typed(given, name, {}) for name in (OWN, "text_config", "vision_config"))
    positions = CONNECTORS[_one_of(given, "connector_type", CONNECTORS)]
    resampler = ResamplerConfig(
        _size(given, "num_queries"),
        _size(given, "group") if positions == "queries" else 1,
        _size(given, "num_resampler_layers"),
        positions=positions,
        **_some(own, OWN_RESAMPLER_FIELDS),
    )
    tower = replace(
        _sizes(SIGLIP, vision),
        feature_layer=_typed(given, "vision_feature_layer", 0),
        drop_first_token=STRATEGIES[_one_of(given, "vision_feature_select_strategy", STRATEGIES)],
        **_some(own, OWN_TOWER_FIELDS),
    )
    if not -tower.num_hidden_layers - 2 < tower.feature_layer <= tower.num_hidden_layers:
        raise InputError(
            f"config: vision_feature_layer is {tower.feature_layer}, and the tower has "
            f"{tower.num_hidden_layers} layers"
        )
    decoder = _sizes(TEXT[_one_of(text, "model_type", TEXT)], text | _rope(text))
    for name, size in (("hidden_size", decoder), ("vision_hidden_size", tower)):
        _one_of({name: size.hidden_size} | given, name, (size.hidden_size,))
    config = Config(tower, resampler, decoder, _size(given, "tokenizer_model_max_length"))
    alike = (replace(config, **_some(asdict(c), OWN_FIELDS)) for c in CONFIGS.values())
    known = next((c for c in alike if c in CONFIGS.values()), config)
    return replace(known, **_some(own, OWN_FIELDS))


def _sizes(public: PublicClass[T], given: dict[str, Any]) -> T:
    """What `transformers` would make of this, as far as this model has it."""
    given = public.defaults | given
    if given.get("num_key_value_heads", 0) is None:
        given["num_key_value_heads"] = given["num_attention_heads"]
    for name, allowed in public.only.items():
        _one_of({name: allowed[0]} | given, name, allowed)
    kinds = {field.name: field.default for field in fields(public.own)}
    sizes = public.own(**{name: _size(given, name, kinds[name]) for name in public.defaults})
    for kind in given.get("layer_types") or ():
        _one_of({"layer_types": kind}, "layer_types", ("full_attention",))
    heads, size = sizes.num_attention_heads, sizes.hidden_size
    few = getattr(sizes, "num_key_value_heads", heads)
    if size % heads or heads % few or given.get("head_dim") not in (None, size // heads):
        raise InputError(
            f"config: {heads} heads ({few} of keys) of {given.get('head_dim', 'equal')} size do "
            f"not divide hidden_size {size}"
        )
    return sizes


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    """Settings of rotary positions, under the names from before version 5 of `transformers`."""
    rope = text.get("rope_parameters") or {}
    for kind in (text.get("rope_scaling") or {}, rope):
        _one_of({"rope_type": kind.get("type", "default")} | kind, "rope_type", ("default",))
    return _some(rope, ("rope_theta", "partial_rotary_factor"))


def _some(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _one_of(given: dict[str, Any], name: str, allowed: Iterable[Any]) -> Any:
    if (value := given.get(name)) not in list(allowed):
        raise InputError(
            f"config: {name} is {value!r}; this model has only {', '.join(map(repr, allowed))}"
        )
    return value


def _size(given: dict[str, Any], name: str, like: float = 0) -> Any:
    value = _typed(given, name, like)
    if not isinstance(like, bool) and value <= 0:
        raise InputError(f"config: {name} is {value}; it should be positive")
    return value


def _typed(given: dict[str, Any], name: str, like: Any) -> Any:
    """The value, of the type of the other one; integers may stand for floats."""
    kinds = (int, float) if isinstance(like, float) else (type(like),)
    if type(value := given.get(name)) not in kinds:
        said = "missing" if value is None else repr(value)
        raise InputError(f"config: {name} is {said}; it should be of type {kinds[-1].__name__}")
    return value
