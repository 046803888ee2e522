"""Heads compute what is published of them, written here anew with the weights as makers ship them:
DeepSeek-AI 2024 (DeepSeek-V3), vLLM's deepseek_mtp, glm4_moe_mtp, glm4_moe_lite_mtp, mimo_mtp
and nemotron_h_mtp, Baidu's ERNIE.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_server.engine.memory import DeviceMemory
from mlx_server.engine.protocol import LoadOptions
from mlx_server.engine.run.backend import Backend
from mlx_server.engine.run.heads.head import Head
from tests.support.heads import build_headed
from tests.support.layer_heads import LAYERED

TOKENS = [3, 50, 7, 120, 31, 9, 77, 4]
"""No more than DeepSeek V3.2 attends to, whatever its index says."""
BARE = ("ernie4_5_moe", "mimo")
"""Their heads read and give states before the last norm."""
BEFORE = {
    "ernie4_5_moe": "model.mtp_block.0.",
    "mimo": "model.mtp_layers.0.",
    "nemotron_h": "mtp.layers.",
}
JOINING = {
    "ernie4_5_moe": ("model.mtp_emb_norm.0", "model.mtp_hidden_norm.0", "model.mtp_linear_proj.0"),
    "mimo": ("token_layernorm", "hidden_layernorm", "input_proj"),
    "nemotron_h": ("0.enorm", "0.hnorm", "0.eh_proj"),
}
LAST = {
    "ernie4_5_moe": "model.norm",
    "mimo": "final_layernorm",
    "nemotron_h": "1.final_layernorm",
}


class Checkpoint:
    """In `folder`. Names of its head's weights begin with what `before` has for its kind, or as
    those of one layer more than the model counts.
    """

    def __init__(self, folder: Path, before: dict[str, str]) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights = cast(dict[str, mx.array], mx.load(str(folder / "model.safetensors")))
        self.kind = self.config["model_type"]
        self.before = before.get(self.kind, f"model.layers.{self.config['num_hidden_layers']}.")

    def number(self, name: str) -> int:
        return cast(int, self.config[name])


class Formula(Checkpoint):
    """Of the head in the checkpoint `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, BEFORE)

    def __getitem__(self, name: str) -> mx.array:
        whole = name if name.startswith("model.") else self.before + name
        return self.weights[f"{whole}.weight"]

    def times(self, x: mx.array, name: str) -> mx.array:
        product = x @ self[name].T
        return product + self.weights.get(f"{self.before}{name}.bias", 0.0)

    def norm(self, x: mx.array, name: str, eps: float | None = None) -> mx.array:
        return normed(x, self[name], self.config["rms_norm_eps"] if eps is None else eps)

    def states(self, model: Any) -> mx.array:
        """Of a model (1, tokens, width), as the head reads them."""
        if self.kind == "nemotron_h":
            return cast(mx.array, model(mx.array([TOKENS])))
        x = model.embed_tokens(mx.array([TOKENS]))
        for layer in model.layers:
            mask = mx.tril(mx.ones((len(TOKENS), len(TOKENS)), dtype=mx.bool_))
            x = layer(x, mask, None)
        return x if self.kind in BARE else model.norm(x)

    def logits(self, tokens: mx.array, states: mx.array) -> tuple[mx.array, mx.array]:
        """After each of `tokens` (1, tokens); and the states that stand for the model's (1, tokens,
        width) when the head goes on.
        """
        table = "backbone.embeddings" if self.kind == "nemotron_h" else "model.embed_tokens"
        embedded = self.weights[f"{table}.weight"][tokens]
        names = JOINING.get(self.kind, ("enorm", "hnorm", "eh_proj"))
        both = [self.norm(embedded, names[0]), self.norm(states, names[1])]
        if self.kind == "mimo":
            both.reverse()
        out = self.layer(self.times(mx.concatenate(both, axis=-1), names[2]))
        last = self.norm(out, LAST.get(self.kind, "shared_head.norm"))
        own = out if self.kind in BARE else last
        return last @ self.weights["lm_head.weight"].T, own

    def layer(self, x: mx.array) -> mx.array:
        if self.kind == "nemotron_h":
            x = x + self.attention(self.norm(x, "0.norm"), "0.mixer")
            return x + self.experts(self.norm(x, "1.norm"), "1.mixer", self.squared)
        latent = "kv_lora_rank" in self.config and self.before + KV_B in self.weights
        attend = self.latent_attention if latent else self.attention
        x = x + attend(self.norm(x, "input_layernorm"))
        inner = self.norm(x, "post_attention_layernorm")
        if f"{self.before}mlp.gate.weight" in self.weights:
            return x + self.experts(inner, "mlp", self.gated)
        return x + self.gated(inner)

    def attention(self, x: mx.array, name: str = "self_attn") -> mx.array:
        heads, keys = self.number("num_attention_heads"), self.number("num_key_value_heads")
        q = split(self.times(x, f"{name}.q_proj"), heads)
        k = split(self.times(x, f"{name}.k_proj"), keys)
        v = split(self.times(x, f"{name}.v_proj"), keys)
        rotated = q.shape[-1]
        if self.kind == "glm4_moe":
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
            rotated = int(rotated * self.config["partial_rotary_factor"])
        if self.kind != "nemotron_h":
            in_pairs = self.kind == "ernie4_5_moe"
            q, k = (self.turned(one, rotated, traditional=in_pairs) for one in (q, k))
        k, v = (mx.repeat(one, heads // keys, axis=1) for one in (k, v))
        return self.times(attended(q, k, v), f"{name}.o_proj")

    def latent_attention(self, x: mx.array) -> mx.array:
        """Multi-head latent attention, not absorbed."""
        heads, plain = self.number("num_attention_heads"), self.number("qk_nope_head_dim")
        turned, rank = self.number("qk_rope_head_dim"), self.number("kv_lora_rank")
        compressed = self.norm(self.times(x, "self_attn.q_a_proj"), "self_attn.q_a_layernorm", 1e-6)
        q = split(self.times(compressed, "self_attn.q_b_proj"), heads)
        both = self.times(x, "self_attn.kv_a_proj_with_mqa")
        latent = self.norm(both[..., :rank], "self_attn.kv_a_layernorm", 1e-6)
        kv = split(self.times(latent, "self_attn.kv_b_proj"), heads)
        positions = self.turned(split(both[..., rank:], 1), turned, traditional=True)
        k = mx.concatenate([kv[..., :plain], mx.repeat(positions, heads, axis=1)], axis=-1)
        q_turned = self.turned(q[..., plain:], turned, traditional=True)
        q = mx.concatenate([q[..., :plain], q_turned], axis=-1)
        return self.times(attended(q, k, kv[..., plain:]), "self_attn.o_proj")

    def turned(self, x: mx.array, dims: int, *, traditional: bool) -> mx.array:
        base = self.config["rope_theta"]
        return mx.fast.rope(x, dims, traditional=traditional, base=base, scale=1.0, offset=0)

    def gated(self, x: mx.array, name: str = "mlp") -> mx.array:
        gate = self.times(x, f"{name}.gate_proj")
        up = self.times(x, f"{name}.up_proj")
        return self.times(gate * mx.sigmoid(gate) * up, f"{name}.down_proj")

    def squared(self, x: mx.array, name: str) -> mx.array:
        return self.times(mx.maximum(self.times(x, f"{name}.up_proj"), 0) ** 2, f"{name}.down_proj")

    def experts(self, x: mx.array, name: str, expert: Callable[..., mx.array]) -> mx.array:
        scores = mx.sigmoid(self.times(x, f"{name}.gate"))
        chances = scores + self.weights[f"{self.before}{name}.gate.e_score_correction_bias"]
        least = mx.sort(chances, axis=-1)[..., -self.number("num_experts_per_tok"), None]
        chosen = mx.where(chances >= least, scores, 0.0)
        chosen = chosen / chosen.sum(axis=-1, keepdims=True) * self.config["routed_scaling_factor"]
        out = expert(x, f"{name}.shared_experts")
        for number in range(self.number("n_routed_experts")):
            out = out + expert(x, f"{name}.experts.{number}") * chosen[..., number, None]
        return out


KV_B = "self_attn.kv_b_proj.weight"


def normed(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return x * mx.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def split(x: mx.array, heads: int) -> mx.array:
    """(1, tokens, width) to (1, heads, tokens, width of each)."""
    return x.reshape(1, x.shape[1], heads, -1).swapaxes(1, 2)


def attended(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    seen = mx.tril(mx.ones(scores.shape[-2:], dtype=mx.bool_))
    out = mx.softmax(mx.where(seen, scores, -mx.inf), axis=-1) @ v
    return out.swapaxes(1, 2).reshape(1, out.shape[2], -1)


def shipped(folder: Path, name: str) -> Path:
    """Norms and biases have a say, too."""
    path = build_headed(folder, name, agreeing=False, raw=True)
    file = str(path / "model.safetensors")
    weights = cast(dict[str, mx.array], mx.load(file))
    for place, (key, one) in enumerate(sorted(weights.items())):
        if one.ndim == 1:
            weights[key] = one + mx.random.uniform(-0.3, 0.3, one.shape, key=mx.random.key(place))
    mx.eval(weights)
    mx.save_safetensors(file, weights)
    return path


def head_of(path: Path) -> tuple[Head, Any]:
    options = LoadOptions(speculation="auto")
    backend = Backend(path, options, DeviceMemory("50%", None))
    assert backend.head is not None
    return backend.head, backend.head.trunk.body


@pytest.mark.parametrize("name", LAYERED)
def test_a_head_computes_what_is_published(tmp_path: Path, name: str) -> None:
    path = shipped(tmp_path / name, name)
    head, model = head_of(path)
    formula = Formula(path)
    states = head.trunk(mx.array([TOKENS]), [None] * len(model.layers))
    assert mx.allclose(states, formula.states(model), atol=1e-4)
    told, cache = mx.array([[*TOKENS[1:], 90]]), head.new_cache()
    expected, own = formula.logits(told, states)
    for start, end in ((0, 5), (5, 6), (6, 8)):
        out = head(told[:, start:end], states[:, start:end], cache)
        assert mx.allclose(out, own[:, start:end], rtol=1e-3, atol=1e-4)
        assert mx.allclose(head.project(out), expected[:, start:end], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v32", "mimo_v2_flash"])
def test_a_head_in_float8_is_dequantized_as_its_model_is(tmp_path: Path, name: str) -> None:
    path = build_headed(tmp_path / name, name, agreeing=False, raw=True)
    whole, _ = head_of(path)
    file = str(path / "model.safetensors")
    weights = cast(dict[str, mx.array], mx.load(file))
    mx.eval(weights)
    for key, one in list(weights.items()):
        if one.ndim == 2 and any(x in key for x in ("self_attn.kv", "experts", "mlp.up_proj")):
            scale = mx.abs(one).max() / 448
            weights[key] = mx.to_fp8(one / scale)
            weights[f"{key}_scale_inv"] = mx.full((1, 1), scale)  # less than a block of 128 each
    mx.save_safetensors(file, weights)
    rough, _ = head_of(path)
    kept = dict(tree_flatten(rough.model.parameters()))
    for key, one in tree_flatten(whole.model.parameters()):
        assert mx.allclose(kept[key], one, rtol=0.08, atol=0.01 * mx.abs(one).max().item())
        changed = any(
            part in key
            for part in ("kv_a_proj", "embed_q", "unembed_out", "experts", "switch_mlp", "mlp.up")
        )
        assert changed == (not mx.array_equal(kept[key], one).item())
