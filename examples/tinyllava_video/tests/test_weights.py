"""TinyLLaVA-Video's checkpoints: what is read, where it goes, what is written, what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from examples.tinyllava_video import weights
from examples.tinyllava_video.config import CONFIGS, Config, Qwen2Config, named
from examples.tinyllava_video.errors import InputError
from examples.tinyllava_video.keys import entries
from examples.tinyllava_video.model import TinyLlavaVideo, abstract
from examples.tinyllava_video.public_config import config_dict
from examples.tinyllava_video.weights import config_from, load, save

TINY = ("tiny-qwen2", "tiny-phi")
Arrays = dict[str, np.ndarray]


def drawn(config: Config, dtype: Any = np.float32) -> Arrays:
    """A checkpoint with random numbers, made from the keys."""
    rng = np.random.default_rng(0)
    wanted = entries(abstract(config)).values()
    return {e.key: rng.normal(0, 0.3, e.stored_shape).astype(dtype) for e in wanted}


def written(directory: Path, arrays: Arrays, description: Mapping[str, Any] | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    save_file({k: np.ascontiguousarray(x) for k, x in arrays.items()}, file_of(directory))
    if description is not None:
        (directory / "config.json").write_text(json.dumps(description))
    return directory


def file_of(directory: Path) -> Path:
    return directory / "model.safetensors"


def parameters(model: TinyLlavaVideo) -> dict[tuple[str | int, ...], jax.Array]:
    return {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_holds(model: TinyLlavaVideo, arrays: Arrays) -> None:
    """Bit by bit what is stored, transposed as PyTorch and JAX differ."""
    wanted = entries(model)
    for path, array in parameters(model).items():
        stored = arrays[wanted[path].key]
        if path[-1] == "kernel":
            stored = stored.T if stored.ndim == 2 else np.moveaxis(stored, (0, 1), (3, 2))
        assert array.dtype == stored.dtype
        assert np.asarray(array).tobytes() == stored.tobytes()


# --- names ---------------------------------------------------------------------------------------

# Of the public checkpoints, layers of one of each kind; written down, not derived.
SIGLIP = """
embeddings.patch_embedding.weight embeddings.patch_embedding.bias
embeddings.position_embedding.weight post_layernorm.weight post_layernorm.bias head.probe
head.attention.in_proj_weight head.attention.in_proj_bias head.attention.out_proj.weight
head.attention.out_proj.bias head.layernorm.weight head.layernorm.bias head.mlp.fc1.weight
head.mlp.fc1.bias head.mlp.fc2.weight head.mlp.fc2.bias
""".split()
SIGLIP_LAYER = [
    f"encoder.layers.{{}}.{name}.{leaf}"
    for name in "layer_norm1 layer_norm2 self_attn.q_proj self_attn.k_proj self_attn.v_proj "
    "self_attn.out_proj mlp.fc1 mlp.fc2".split()
    for leaf in ("weight", "bias")
]
RESAMPLER = "latents linear.weight linear.bias norm.weight norm.bias".split()
RESAMPLER_LAYER = """
layers.{}.0.norm_media.weight layers.{}.0.norm_media.bias layers.{}.0.norm_latents.weight
layers.{}.0.norm_latents.bias layers.{}.0.to_q.weight layers.{}.0.to_kv.weight
layers.{}.0.to_out.weight layers.{}.1.0.weight layers.{}.1.0.bias layers.{}.1.1.weight
layers.{}.1.3.weight
""".split()
QWEN2 = ["model.embed_tokens.weight", "model.norm.weight"]
QWEN2_LAYER = """
model.layers.{}.self_attn.q_proj.weight model.layers.{}.self_attn.q_proj.bias
model.layers.{}.self_attn.k_proj.weight model.layers.{}.self_attn.k_proj.bias
model.layers.{}.self_attn.v_proj.weight model.layers.{}.self_attn.v_proj.bias
model.layers.{}.self_attn.o_proj.weight model.layers.{}.mlp.gate_proj.weight
model.layers.{}.mlp.up_proj.weight model.layers.{}.mlp.down_proj.weight
model.layers.{}.input_layernorm.weight model.layers.{}.post_attention_layernorm.weight
""".split()
PHI = """
model.embed_tokens.weight model.final_layernorm.weight model.final_layernorm.bias lm_head.weight
lm_head.bias
""".split()
PHI_LAYER = [
    f"model.layers.{{}}.{name}.{leaf}"
    for name in "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense mlp.fc1 "
    "mlp.fc2 input_layernorm".split()
    for leaf in ("weight", "bias")
]


def expected_keys(config: Config, text: list[str], text_layer: list[str]) -> list[str]:
    parts = (
        ("vision_tower._vision_tower.vision_model.", SIGLIP, SIGLIP_LAYER, config.vision),
        ("connector._connector.", RESAMPLER, RESAMPLER_LAYER, None),
        ("language_model.", text, text_layer, config.text),
    )
    keys = []
    for prefix, once, layer, sizes in parts:
        layers = sizes.num_hidden_layers if sizes else config.resampler.num_layers
        keys += [prefix + key for key in once]
        keys += [prefix + key.format(i) for i in range(layers) for key in layer]
    return keys


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_one_key(name: str) -> None:
    config = named(name)
    text = (QWEN2, QWEN2_LAYER) if isinstance(config.text, Qwen2Config) else (PHI, PHI_LAYER)
    found = [entry.key for entry in entries(abstract(config)).values()]
    assert len(set(found)) == len(found)
    assert sorted(found) == sorted(expected_keys(config, *text))


def test_axes_go_back() -> None:
    for path, entry in entries(abstract(named("tiny-phi"))).items():
        here = np.arange(prod(entry.shape)).reshape(entry.shape)
        there = here.transpose(entry.back)
        assert there.shape == entry.stored_shape
        np.testing.assert_array_equal(there.transpose(entry.axes), here)
        index = tuple(slice(n // 3, n - n // 4) for n in entry.shape)
        part = there[entry.stored_index(index)].transpose(entry.axes)
        np.testing.assert_array_equal(part, here[index])
        assert (entry.axes != tuple(range(here.ndim))) == (path[-1] == "kernel")


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_round_trip(name: str, tmp_path: Path) -> None:
    arrays = drawn(named(name))
    model = load(written(tmp_path / "a", arrays), named(name))
    assert_holds(model, arrays)
    save(model, tmp_path / "b")
    assert config_from(tmp_path / "b") == named(name)
    again = load_file(file_of(tmp_path / "b"))
    assert again.keys() == arrays.keys()
    assert all(again[key].tobytes() == arrays[key].tobytes() for key in arrays)
    with safe_open(file_of(tmp_path / "b"), "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert_holds(load(tmp_path / "b"), arrays)


def test_several_files(tmp_path: Path) -> None:
    arrays = drawn(named("tiny-qwen2"))
    model = load(written(tmp_path / "a", arrays), named("tiny-qwen2"))
    save(model, tmp_path / "b", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "b/model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(x.nbytes for x in arrays.values())}
    assert index["weight_map"].keys() == arrays.keys()
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        held = load_file(tmp_path / "b" / file)
        assert {index["weight_map"][key] for key in held} == {file}
        assert sum(x.nbytes for x in held.values()) <= 20_000 or len(held) == 1
    assert not file_of(tmp_path / "b").exists()
    assert_holds(load(tmp_path / "b"), arrays)
    (tmp_path / "b" / files[1]).unlink()
    with pytest.raises(InputError, match=f"lacks {files[1]}, which .* names"):
        load(tmp_path / "b")


def test_other_files_come_along(tmp_path: Path) -> None:
    save(load(written(tmp_path / "a", drawn(named("tiny-phi"))), named("tiny-phi")), tmp_path / "b")
    description = json.loads((tmp_path / "b/config.json").read_text())
    description["llm_model_name_or_path"] = "somewhere/phi-2"
    (tmp_path / "b/config.json").write_text(json.dumps(description))
    (tmp_path / "b/tokenizer.json").write_text("{}")
    model = load(tmp_path / "b")
    model.config = replace(model.config, num_frames=9)
    save(model, tmp_path / "c", source=tmp_path / "b", max_shard_bytes=100_000)
    assert json.loads((tmp_path / "c/config.json").read_text()) == description
    assert (tmp_path / "c/tokenizer.json").read_text() == "{}"
    assert not file_of(tmp_path / "c").exists()
    assert_holds(load(tmp_path / "c"), load_file(file_of(tmp_path / "b")))
    with pytest.raises(InputError, match="holds weights already"):
        save(model, tmp_path / "c")
    model.config = replace(model.config, text=replace(model.config.text, rope_theta=5.0))
    with pytest.raises(InputError, match=r"source: .* is a checkpoint of another model"):
        save(model, tmp_path / "d", source=tmp_path / "b")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("rows", [100, 4096])
def test_a_copy_of_tied_embeddings(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "TIED_ROWS", rows)
    arrays = drawn(named("tiny-qwen2"))
    embedding = arrays["language_model.model.embed_tokens.weight"]
    copied = arrays | {"language_model.lm_head.weight": embedding.copy()}
    assert_holds(load(written(tmp_path, copied), named("tiny-qwen2")), arrays)
    copied["language_model.lm_head.weight"][256, 31] += 1e-6
    written(tmp_path, copied)
    with pytest.raises(InputError, match=r"lm_head.weight differs from .*embed_tokens.weight"):
        load(tmp_path, named("tiny-qwen2"))
    untied = replace(
        named("tiny-qwen2"), text=replace(named("tiny-qwen2").text, tie_word_embeddings=False)
    )
    assert_holds(load(tmp_path, untied), copied)


def test_buffers_are_ignored(tmp_path: Path) -> None:
    arrays = drawn(named("tiny-qwen2"))
    buffers = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "vision_tower._vision_tower.vision_model.embeddings.position_ids": np.arange(16)[None],
    }
    model = load(written(tmp_path, arrays | buffers), named("tiny-qwen2"))
    assert_holds(model, arrays)


# --- dtypes and devices --------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(stored: Any, tmp_path: Path) -> None:
    arrays = drawn(named("tiny-phi"), stored)
    mesh = devices(4)
    assert_holds(load(written(tmp_path / "a", arrays), named("tiny-phi"), mesh=mesh), arrays)
    wide = load(tmp_path / "a", named("tiny-phi"), dtype=jnp.float32)
    assert_holds(wide, {key: x.astype(np.float32) for key, x in arrays.items()})
    save(load(tmp_path / "a", named("tiny-phi")), tmp_path / "b")
    assert file_of(tmp_path / "b").stat().st_size < file_of(tmp_path / "a").stat().st_size + 100
    assert_holds(load(tmp_path / "b"), arrays)


def test_casts(tmp_path: Path) -> None:
    arrays = drawn(named("tiny-qwen2"))
    written(tmp_path, arrays)
    narrow = load(tmp_path, named("tiny-qwen2"), dtype="bfloat16")
    assert_holds(narrow, {key: x.astype(ml_dtypes.bfloat16) for key, x in arrays.items()})
    key = "language_model.model.layers.1.mlp.up_proj.weight"
    arrays[key][3, 4] = 1e5
    written(tmp_path, arrays)
    load(tmp_path, named("tiny-qwen2"), dtype="bfloat16")
    with pytest.raises(InputError, match=f"dtype: {key} holds numbers too large for float16"):
        load(tmp_path, named("tiny-qwen2"), dtype=jnp.float16)


def devices(number: int) -> Mesh:
    return jax.make_mesh(
        (number,), ("model",), devices=jax.devices()[:number], axis_types=(AxisType.Auto,)
    )


OUT, IN, WHOLE = (PartitionSpec(*axes) for axes in ((None, "model"), ("model", None), (None, None)))
ROWS = IN
PLACES = {
    "vision_tower.layers.1.self_attn.q_proj.kernel": OUT,
    "vision_tower.layers.1.self_attn.out_proj.kernel": IN,
    "vision_tower.layers.1.mlp.fc1.kernel": OUT,
    "vision_tower.layers.1.mlp.fc2.kernel": IN,
    "vision_tower.layers.1.mlp.fc1.bias": PartitionSpec(None),
    "vision_tower.embeddings.patch_embedding.kernel": PartitionSpec(None, None, None, "model"),
    "vision_tower.embeddings.position_embedding.embedding": ROWS,
    "vision_tower.head.in_proj.kernel": OUT,
    "vision_tower.head.probe": PartitionSpec(None, None, None),
    "connector.latents": WHOLE,
    "connector.linear.kernel": OUT,
    "connector.layers.0.attention.to_kv.kernel": OUT,
    "connector.layers.0.attention.to_out.kernel": IN,
    "connector.layers.0.feed_forward.fc1.kernel": OUT,
    "connector.layers.0.feed_forward.fc2.kernel": IN,
    "connector.layers.0.feed_forward.norm.scale": PartitionSpec(None),
    "language_model.layers.1.self_attn.k_proj.kernel": OUT,
    "language_model.layers.1.self_attn.o_proj.kernel": IN,
}
QWEN2_PLACES = {
    "language_model.embed_tokens.embedding": ROWS,
    "language_model.layers.0.mlp.gate_proj.kernel": OUT,
    "language_model.layers.0.mlp.up_proj.kernel": OUT,
    "language_model.layers.0.mlp.down_proj.kernel": IN,
    "language_model.norm.scale": PartitionSpec(None),
}
PHI_PLACES = {
    "language_model.embed_tokens.embedding": WHOLE,  # 257 do not divide
    "language_model.lm_head.kernel": WHOLE,
    "language_model.layers.0.mlp.fc2.kernel": IN,
}


@pytest.mark.parametrize(("name", "more"), [(TINY[0], QWEN2_PLACES), (TINY[1], PHI_PLACES)])
def test_sharded(name: str, more: dict[str, PartitionSpec], tmp_path: Path) -> None:
    config = named(name)
    if name == "tiny-qwen2":
        config = replace(config, text=replace(config.text, vocab_size=264))
    arrays = drawn(config)
    mesh = devices(8)
    model = load(written(tmp_path / "a", arrays), config, mesh=mesh)
    assert_holds(model, arrays)
    found = {".".join(map(str, path)): x for path, x in parameters(model).items()}
    for path, spec in (PLACES | more).items():
        sharding = found[path].sharding
        assert sharding.spec == spec
        assert sharding.mesh == mesh
        shards = found[path].addressable_shards
        assert len(shards) == 8
        part = found[path].size // (8 if "model" in spec else 1)
        assert {shard.data.size for shard in shards} == {part}
    save(model, tmp_path / "b")
    assert_holds(load(tmp_path / "b"), arrays)

    rng = np.random.default_rng(1)
    pixels = rng.uniform(-1, 1, (1, 3, 30, 30, 3)).astype(np.float32)
    before, after = rng.integers(0, 257, (1, 5)), rng.integers(0, 257, (1, 2))
    run = nnx.jit(lambda model: model(pixels, before, after))
    np.testing.assert_allclose(run(model), run(load(tmp_path / "b")), rtol=0, atol=1e-4)


def test_each_device_reads_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, drawn(named("tiny-qwen2")))
    opened, read = weights.open_arrays, []

    def watched(directory: Path) -> dict[str, Any]:
        def watch(key: str, stored: Any) -> Any:
            def spy(index: tuple[slice, ...]) -> np.ndarray:
                part = stored.read(index)
                read.append((key, part.shape))
                return part

            return stored._replace(read=spy)

        return {key: watch(key, stored) for key, stored in opened(directory).items()}

    monkeypatch.setattr(weights, "open_arrays", watched)
    load(tmp_path, named("tiny-qwen2"), mesh=devices(8))
    key = "language_model.model.layers.0.mlp.{}_proj.weight"
    parts = {kind: [s for k, s in read if k == key.format(kind)] for kind in ("up", "down")}
    assert parts == {"up": [(6, 32)] * 8, "down": [(32, 6)] * 8}


def test_meshes_that_cannot_be_used(tmp_path: Path) -> None:
    written(tmp_path, drawn(named("tiny-phi")))
    with pytest.raises(InputError, match="axis: the mesh has model, but no 'tensor'"):
        load(tmp_path, named("tiny-phi"), mesh=devices(2), axis="tensor")
    explicit = jax.make_mesh((2,), ("model",), (AxisType.Explicit,), devices=jax.devices()[:2])
    with pytest.raises(InputError, match=r"mesh: its axis 'model' .*AxisType\.Auto"):
        load(tmp_path, named("tiny-phi"), mesh=explicit)


# --- what is no checkpoint of the model ----------------------------------------------------------


def test_all_problems_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = drawn(named("tiny-qwen2"))
    norms = [key for key in arrays if "norm" in key and "vision" in key]
    for key in norms:
        del arrays[key]
    arrays["language_model.model.layers.7.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
    key = "language_model.model.layers.1.mlp.up_proj.weight"
    arrays[key] = arrays[key].T
    other = "language_model.model.layers.1.mlp.down_proj.weight"
    arrays[other] = arrays[other].astype(np.int8)
    written(tmp_path, arrays)
    monkeypatch.setattr(weights, "_placed", lambda *_: pytest.fail("read although it does not fit"))
    with pytest.raises(InputError) as caught:
        load(tmp_path, named("tiny-qwen2"))
    said = str(caught.value)
    assert f"{len(norms)} missing: {norms[0]}, " in said
    assert f" and {len(norms) - 5} more; " in said
    assert norms[5] not in said
    assert "1 unexpected: language_model.model.layers.7.mlp.up_proj.weight; " in said
    assert f"1 of another shape: {key} (32, 48) instead of (48, 32); " in said
    assert f"1 of a dtype that is not read: {other} I8" in said


@pytest.mark.parametrize(("given", "stored"), [TINY, TINY[::-1]])
def test_the_other_variant(given: str, stored: str, tmp_path: Path) -> None:
    written(tmp_path, drawn(named(stored)))
    one, other = (name.removeprefix("tiny-") for name in (given, stored))
    with pytest.raises(InputError, match=f"of the variant '{one}', but .* is of '{other}'"):
        load(tmp_path, named(given))
    (tmp_path / "config.json").write_text(json.dumps(config_dict(named(given))))
    said = f"the config.json in .* describes the variant '{one}', but the weights are of '{other}'"
    with pytest.raises(InputError, match=said) as caught:  # nobody gave a config
        load(tmp_path)
    assert "leave config out" not in str(caught.value)


def test_damaged_files(tmp_path: Path) -> None:
    written(tmp_path, drawn(named("tiny-phi")))
    data = file_of(tmp_path).read_bytes()
    for damaged in (data[:-1], data[:100], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        file_of(tmp_path).write_bytes(damaged)
        with pytest.raises(InputError, match=r"model\.safetensors is damaged .*download it again"):
            load(tmp_path, named("tiny-phi"))
    file_of(tmp_path).unlink()
    with pytest.raises(InputError, match=r"has no weights; there should be model\.safetensors"):
        load(tmp_path, named("tiny-phi"))
    index = tmp_path / "model.safetensors.index.json"
    for text, said in (("{}", "has no weight_map"), ("{", "cannot be read"), ("[]", "a list")):
        index.write_text(text)
        with pytest.raises(InputError, match=said):
            load(tmp_path, named("tiny-phi"))


def test_no_configuration(tmp_path: Path) -> None:
    written(tmp_path, drawn(named("tiny-phi")))
    with pytest.raises(InputError, match=r"config\.json does not exist; give the folder of"):
        load(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        config_from(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        load(tmp_path)


# --- config.json ---------------------------------------------------------------------------------


PUBLIC = {
    "model_type": "tinyllava",
    "connector_type": "groupresampler",
    "num_queries": 512,
    "group": 16,
    "num_resampler_layers": 3,
    "hidden_size": 2048,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "patch",
    "tokenizer_model_max_length": 3072,
    "image_aspect_ratio": "pad",  # for pictures; frames of videos are squeezed whatever it says
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
PHI_TEXT = {
    "model_type": "phi",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "partial_rotary_factor": 0.4,
}


def read(directory: Path, description: Mapping[str, Any]) -> Config:
    (directory / "config.json").write_text(json.dumps(description))
    return config_from(directory)


def test_public_configurations(tmp_path: Path) -> None:
    assert read(tmp_path, PUBLIC) == named("TinyLLaVA-Video-Qwen2.5-3B-Group-16-512")
    phi = PUBLIC | {"text_config": PHI_TEXT, "hidden_size": 2560}
    for connector in ("naiveresampler", "resamplerwithpe"):
        naive = {"connector_type": connector, "group": None}
        assert read(tmp_path, phi | naive) == named("TinyLLaVA-Video-Phi2-Naive-16-512")
        qwen = named("TinyLLaVA-Video-Qwen2.5-3B-Naive-16-512")
        assert read(tmp_path, PUBLIC | naive) == qwen
    rope = {"rope_theta": 12.5, "partial_rotary_factor": 0.25, "rope_type": "default"}
    text = read(tmp_path, phi | {"text_config": PHI_TEXT | {"rope_parameters": rope}}).text
    assert (text.rope_theta, text.partial_rotary_factor) == (12.5, 0.25)
    naive = read(tmp_path, PUBLIC | {"connector_type": "resampler", "group": None}).resampler
    assert (naive.groups, naive.positions, naive.num_queries) == (1, "none", 512)
    kept = read(tmp_path, PUBLIC | {"vision_feature_select_strategy": "cls_patch"}).vision
    assert not kept.drop_first_token


def within(part: str, **fields: Any) -> Callable[[], dict[str, Any]]:
    return lambda: PUBLIC | {part: PUBLIC[part] | fields}


def phi_with(**fields: Any) -> Callable[[], dict[str, Any]]:
    return lambda: PUBLIC | {"text_config": PHI_TEXT | fields, "hidden_size": 2560}


REFUSED = {
    "model_type is 'llava'": lambda: PUBLIC | {"model_type": "llava"},
    "connector_type is 'mlp'": lambda: PUBLIC | {"connector_type": "mlp"},
    "group is missing": lambda: {k: v for k, v in PUBLIC.items() if k != "group"},
    "num_queries is missing": lambda: {k: v for k, v in PUBLIC.items() if k != "num_queries"},
    "num_queries: 512 are not divisible by 7": lambda: PUBLIC | {"group": 7},
    "num_resampler_layers is '3'": lambda: PUBLIC | {"num_resampler_layers": "3"},
    "vision_feature_layer is -29": lambda: PUBLIC | {"vision_feature_layer": -29},
    "hidden_size is 2560": lambda: PUBLIC | {"hidden_size": 2560},
    "vision_feature_select_strategy is 'all'": lambda: (
        PUBLIC | {"vision_feature_select_strategy": "all"}
    ),
    "text_config is missing": lambda: {k: v for k, v in PUBLIC.items() if k != "text_config"},
    "vision_config is 'siglip'": lambda: PUBLIC | {"vision_config": "siglip"},
    "model_type is None": within("text_config", model_type=None),
    "num_attention_heads is 0": within("text_config", num_attention_heads=0),
    "model_type is 'llama'": within("text_config", model_type="llama"),
    "hidden_act is 'relu'": within("text_config", hidden_act="relu"),
    "use_sliding_window is True": within("text_config", use_sliding_window=True),
    "layer_types": within("text_config", layer_types=["full_attention", "sliding_attention"]),
    "do not divide hidden_size 2048": within("text_config", head_dim=64),
    "rope_type is 'yarn'": within("text_config", rope_scaling={"type": "yarn", "factor": 4.0}),
    "rope_type is 'linear'": within("text_config", rope_parameters={"rope_type": "linear"}),
    "hidden_act is 'gelu'": within("vision_config", hidden_act="gelu"),
    "num_channels is 1": within("vision_config", num_channels=1),
    "vision_use_head is False": within("vision_config", vision_use_head=False),
    "model_type is 'clip_vision_model'": within("vision_config", model_type="clip_vision_model"),
    "qk_layernorm is True": phi_with(qk_layernorm=True),
}


@pytest.mark.parametrize("said", REFUSED)
def test_other_models_are_refused(said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        read(tmp_path, REFUSED[said]())
    assert str(tmp_path / "config.json") in str(caught.value)


def test_what_the_format_cannot_say(tmp_path: Path) -> None:
    model = abstract(named("tiny-phi"))
    odd = replace(model.config.resampler, positions="media")
    model.config = replace(model.config, resampler=odd)
    with pytest.raises(InputError, match="4 groups with positions='media'"):
        save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
