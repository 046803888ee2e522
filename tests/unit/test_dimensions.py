"""What is read of config.json, for each architecture of mlx-lm: its own names, its own defaults."""

import dataclasses
import importlib
import pkgutil
from typing import Any

import mlx_lm.models
import pytest
from mlx_lm.utils import MODEL_REMAPPING, _get_classes
from transformers import CONFIG_MAPPING

from mlx_server import dimensions
from mlx_server.dimensions import (
    CONTEXT,
    FAMILY_CONTEXT,
    LAYERED,
    LAYERED_ONLY,
    NO_LIMIT,
    OWN_CONTEXT,
    RECURRENT,
    STRETCHED_CONTEXT,
    UNKNOWN_CONTEXT,
    Division,
    context_length,
    division,
    head_weights,
    layers_of_ranks,
    number,
    uneven_parts,
)
from tests.support.architectures import ARCHITECTURES, LAYERS, VOCAB_SIZE, own_config
from tests.support.architectures import CONTEXT as TOLD

UNTOLD = frozenset({"afm7", "gear", "hunyuan", "nanbeige"})
"""Families of which neither mlx-lm nor transformers says how long a text may be."""


def test_gpt_2s_names_are_known() -> None:
    assert context_length({"model_type": "gpt2", "n_ctx": 1024, "n_positions": 1024}) == 1024


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_context_is_found_under_each_architectures_own_name(name: str) -> None:
    config = own_config(name)
    named = (*CONTEXT, *OWN_CONTEXT.values())
    told = any(key in part for part in (config, config.get("text_config", {})) for key in named)
    expected = TOLD if told else FAMILY_CONTEXT.get(name.removesuffix("_text"), UNKNOWN_CONTEXT)
    assert context_length(config) == (NO_LIMIT if name in RECURRENT else expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_heads_and_vocabulary_are_found_under_each_architectures_own_name(name: str) -> None:
    config = own_config(name)
    halves = 2 if name.startswith("longcat") else 1
    assert number(config, dimensions.LAYERS) == LAYERS // halves
    assert number(config, dimensions.VOCABULARY) == VOCAB_SIZE
    assert number(config, dimensions.WIDTH) == (96 if name.startswith("lille") else 32)
    assert number(config, dimensions.HEADS, 4) == (8 if name == "mamba2" else 4)


@pytest.mark.parametrize(
    ("config", "of_head", "others"),
    [
        (
            {"model_type": "deepseek_v3", "num_hidden_layers": 6},
            ["model.layers.6.enorm.weight"],
            ["model.layers.5.mlp.gate.weight", "model.layers.61.enorm.weight"],
        ),
        ({"model_type": "deepseek_v3"}, [], ["model.layers.0.mlp.gate.weight"]),
        ({"model_type": "nemotron_h"}, ["mtp.layers.0.enorm.weight"], ["backbone.norm_f.weight"]),
        (
            {"model_type": "ernie4_5_moe", "num_hidden_layers": 6},
            ["model.mtp_block.0.mlp.up_proj.weight", "model.mtp_linear_proj.0.weight"],
            ["model.layers.6.mlp.up_proj.weight"],
        ),
    ],
)
def test_weights_of_a_models_own_head_are_known_by_their_names(
    config: dict[str, Any], of_head: list[str], others: list[str]
) -> None:
    names = head_weights(config)
    assert names is not None
    assert [name for name in (*of_head, *others) if names.match(name)] == of_head


def families() -> dict[str, Any]:
    """The argument class of each family that mlx-lm computes; olmo's needs another package."""
    names = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)} - {"olmo"}
    modules = {name: importlib.import_module(f"mlx_lm.models.{name}") for name in names}
    found = {name: module.ModelArgs for name, module in modules.items() if hasattr(module, "Model")}
    return found | {name: found[home] for name, home in MODEL_REMAPPING.items() if home in found}


def test_each_family_whose_config_may_leave_the_context_out_has_a_default() -> None:
    for name, arguments in families().items():
        fields = dataclasses.fields(arguments)
        required = {one.name for one in fields if one.default is dataclasses.MISSING}
        known = {name.removesuffix("_text"), MODEL_REMAPPING.get(name, name)}
        told = required & {*CONTEXT, OWN_CONTEXT.get(name)} or known & RECURRENT
        assert told or known & (FAMILY_CONTEXT.keys() | UNTOLD), name


def test_defaults_are_those_that_transformers_leaves_out_of_a_config() -> None:
    compared = 0
    for family, length in FAMILY_CONTEXT.items():
        if family in CONFIG_MAPPING and family not in STRETCHED_CONTEXT:
            config = CONFIG_MAPPING[family]().to_dict()
            if "text_config" in config or any(config.get(name) for name in CONTEXT):
                assert context_length(config) == length, family
                compared += 1
    assert compared > 60


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"text_config": {"model_type": "gemma3_text"}, "model_type": "gemma3"}, 32768),
        (
            {
                "model_type": "gemma3",
                "text_config": {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
            },
            131072,
        ),
        ({"model_type": "gemma3_text", "max_position_embeddings": 32768}, 32768),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, 131072),
        ({"model_type": "llava", "text_config": {"model_type": "qwen2"}}, 32768),
        ({"model_type": "internvl_chat", "llm_config": {"max_position_embeddings": 7}}, 7),
        ({"text_config": {"max_position_embeddings": 8}, "max_position_embeddings": 9}, 8),
        ({"text_config": {}, "max_position_embeddings": 9}, 9),
    ],
)
def test_a_multimodal_models_text_part_counts(config: dict[str, Any], expected: int) -> None:
    assert context_length(config) == expected


YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_scaling": YARN | {"type": "yarn"}}, 131072),
        ({"rope_scaling": YARN | {"rope_type": "yarn"}}, 131072),
        ({"rope_parameters": YARN | {"rope_type": "yarn"}}, 131072),
        ({"rope_parameters": {"full_attention": YARN | {"rope_type": "yarn"}}}, 131072),
        ({"rope_scaling": YARN | {"rope_type": "yarn", "factor": 1.0}}, 40960),
        ({"rope_scaling": YARN | {"rope_type": "llama3"}}, 40960),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 40960),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 40960),
        ({"rope_scaling": YARN | {"rope_type": "yarn", "factor": float("inf")}}, 40960),
        ({"rope_scaling": None}, 40960),
    ],
)
def test_yarn_stretches_the_context_where_the_length_beside_it_was_left(
    rope: dict[str, Any], expected: int
) -> None:
    config = {"model_type": "qwen3", "max_position_embeddings": 40960} | rope
    assert context_length(config) == expected


def test_of_two_lengths_the_shorter_counts() -> None:
    config = {"model_type": "qwen", "max_position_embeddings": 32768, "seq_length": 8192}
    assert context_length(config) == 8192


@pytest.mark.parametrize("odd", [None, "many", True, 0, -1, [], {}, 1e30, 10**30])
def test_what_is_no_length_is_passed_over(odd: object) -> None:
    assert context_length({"max_position_embeddings": odd, "n_ctx": 8}) == 8
    assert context_length({"max_position_embeddings": odd}) == UNKNOWN_CONTEXT
    assert context_length({"text_config": odd, "model_type": odd}) == UNKNOWN_CONTEXT
    assert number({"n_layer": odd, "n_layers": 3}, ("n_layer", "n_layers")) in (0, 3, 10**30)


def test_recurrent_models_have_no_limit() -> None:
    for family in RECURRENT:
        assert context_length({"model_type": family, "max_position_embeddings": 2048}) == NO_LIMIT


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "says"),
    [
        (9, 3, 2, "2 ranks cannot share its 9 attention heads and 3 key and value heads; it can"),
        (8, 2, 4, "4 ranks cannot share its 2 key and value heads; it can be divided among 2"),
        (
            6,
            6,
            4,
            "4 ranks cannot share its 6 attention heads and 6 key and value heads; it can be",
        ),
        (7, 7, 3, "3 ranks cannot share its 7 attention heads and 7 key and value heads"),
    ],
)
def test_parts_that_would_be_uneven_are_named(
    heads: int, kv_heads: int, ranks: int, says: str
) -> None:
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    problem = uneven_parts({"text_config": config, "intermediate_size": 768}, ranks)
    assert problem is not None
    assert problem.startswith(says)


TWO_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 5}


@pytest.mark.parametrize(
    ("kind", "ranks", "wanted", "way", "says"),
    [
        ("qwen2", 2, "auto", "tensor", None),
        ("qwen2", 2, "pipeline", "pipeline", None),
        ("qwen2", 3, "auto", "pipeline", None),
        ("qwen2", 3, "tensor", "tensor", "3 ranks cannot share its 4 attention heads and 2 key"),
        ("qwen2", 6, "pipeline", "pipeline", "6 ranks cannot share its 5 layers"),
        ("qwen2", 6, "auto", "tensor", "divided among 2; 6 ranks cannot share its 5 layers"),
        ("llama", 2, "auto", "tensor", None),
        ("llama", 3, "auto", "tensor", "; models of type llama cannot be divided by layers"),
        ("llama", 2, "pipeline", "pipeline", "models of type llama cannot be divided by layers"),
        ("qwen3_next", 2, "auto", "pipeline", None),
        ("qwen3_next", 2, "tensor", "tensor", "no way to divide models of type qwen3_next among"),
    ],
)
def test_a_division_is_the_one_asked_for_or_the_one_that_can_be(
    kind: str, ranks: int, wanted: Division, way: str, says: str | None
) -> None:
    found, problem = division({"model_type": kind, **TWO_HEADS}, ranks, wanted)
    assert found == way
    assert (problem is None) == (says is None)
    assert says is None or says in str(problem)


def test_a_type_that_is_none_is_refused() -> None:
    assert division({"model_type": ["llama"], **TWO_HEADS}, 2, "pipeline")[1] is not None


def test_layers_are_dealt_out_as_mlx_lm_does_it() -> None:
    config = ARCHITECTURES["qwen2"] | {"num_hidden_layers": 7}
    for ranks in (2, 3, 7):
        shares = layers_of_ranks(7, ranks)
        for rank, share in enumerate(shares):
            model = model_of(config)
            model.model.pipeline(Place(rank, ranks))
            assert range(model.model.start_idx, model.model.end_idx) == share


def test_the_types_that_can_be_divided_by_layers_are_those_of_mlx_lm() -> None:
    """But for those that are named beside them, and models around another's body."""
    around = {"kimi_vl", "mistral3", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe"}
    left_out = {"deepseek_v41", "kimi_k3", "muse_spark", "prism_hadamard_qwen35"}
    for name, config in ARCHITECTURES.items():
        model = model_of(config)
        body = getattr(getattr(model, "language_model", model), "model", None)
        if name in LAYERED:
            assert hasattr(body, "pipeline"), name
            assert hasattr(model, "shard") == (name not in LAYERED_ONLY), name
        elif name not in around | left_out:
            assert not hasattr(body, "pipeline"), name


@dataclasses.dataclass
class Place:
    """What mlx-lm asks of a group when it deals out layers."""

    number: int
    count: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.count


def model_of(config: dict[str, Any]) -> Any:
    model_class, arguments = _get_classes(config)
    return model_class(arguments.from_dict(config))


def test_equal_parts_are_no_problem() -> None:
    assert uneven_parts({"num_attention_heads": 9, "num_key_value_heads": 3}, 3) is None
