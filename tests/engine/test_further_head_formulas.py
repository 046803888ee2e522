"""As `test_head_formulas`, of inclusionAI's modeling_bailing_moe_v2, vLLM's bailing_moe_mtp,
bailing_moe_v3_mtp, exaone_moe_mtp, longcat_flash_mtp, mimo_v2_mtp and step3p5_mtp, and of
transformers' exaone_moe.
"""

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from tests.engine.test_head_formulas import Checkpoint, head_of, normed, shipped, split
from tests.support.architectures import WINDOW
from tests.support.further_heads import FURTHER, LING

TOKENS = [3, 50, 7, 120, 31, 9, 77, 4, 18, 66, 90, 2, 41, 105, 13, 58, 99, 21, 36, 8, 111, 70, 5, 8]
"""More than a window."""
BEFORE = {
    "exaone_moe": "mtp.",
    "longcat_flash": "model.mtp.layers.0.",
    "mimo_v2_flash": "model.mtp.layers.0.",
}
JOINING = {
    "exaone_moe": ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc"),
    "longcat_flash": ("enorm.m", "hnorm.m", "eh_proj"),
}
LAYER = {"exaone_moe": "layers.0."}
LAST = {
    "exaone_moe": "norm",
    "longcat_flash": "model.mtp.norm",
    "step3p5": "transformer.shared_head.norm",
}
WINDOWED = {"mimo_v2_flash": "is_sliding_window", "step3p5": "is_sliding"}
"""Their heads read and give states before the last norm; and what says of a layer that it has a
window.
"""
SECOND_NORM = {"mimo_v2_flash": "pre_mlp_layernorm"}
FEED_FORWARD = {"longcat_flash": "transformer_layer.mlp"}


class Formula(Checkpoint):
    """Of the head in the checkpoint `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, BEFORE)
        self.inner = self.before + LAYER.get(self.kind, "")

    def __getitem__(self, name: str) -> mx.array:
        """Of its layer, or of what is before and after it."""
        names = [f"{before}{name}.weight" for before in ("", self.inner, self.before)]
        return next(self.weights[one] for one in names if one in self.weights)

    def times(self, x: mx.array, name: str) -> mx.array:
        return x @ self[name].T

    def norm(self, x: mx.array, name: str) -> mx.array:
        less = 1.0 if self.kind == "step3p5" else 0.0
        return normed(x, self[name] + less, self.config["rms_norm_eps"])

    def states(self, model: Any) -> mx.array:
        """Of a model (1, tokens, width), as the head reads them."""
        if self.kind not in WINDOWED:
            return cast(mx.array, model(mx.array([TOKENS])))
        x = model.embed_tokens(mx.array([TOKENS]))
        for layer in model.layers:
            windowed = getattr(layer, WINDOWED[self.kind])
            x = layer(x, seen(len(TOKENS), WINDOW if windowed else None), None)
        return cast(mx.array, x)

    def logits(self, tokens: mx.array, states: mx.array) -> tuple[mx.array, mx.array]:
        """As of `test_head_formulas`."""
        table = "model.word_embeddings" if self.kind in LING else "model.embed_tokens"
        names = JOINING.get(self.kind, ("enorm", "hnorm", "eh_proj"))
        both = [self.norm(self[table][tokens], names[0]), self.norm(states, names[1])]
        out = self.layer(self.times(mx.concatenate(both, axis=-1), names[2]))
        last = self.norm(out, LAST.get(self.kind, "final_layernorm"))
        output = "transformer.shared_head.output" if self.kind == "step3p5" else "lm_head"
        return self.times(last, output), out if self.kind in WINDOWED else last

    def layer(self, x: mx.array) -> mx.array:
        before = self.norm(x, "input_layernorm")
        latent = self.kind in (*LING[1:], "longcat_flash")
        x = x + (self.latent_attention(before) if latent else self.attention(before))
        before = self.norm(x, SECOND_NORM.get(self.kind, "post_attention_layernorm"))
        if self.kind in LING:
            return x + self.experts(before)
        return x + self.gated(before, FEED_FORWARD.get(self.kind, "mlp"))

    def attention(self, x: mx.array) -> mx.array:
        heads, keys = self.number("num_attention_heads"), self.number("num_key_value_heads")
        if self.kind in LING:
            name, out, norms = "attention", "attention.dense", "{}_layernorm"
            both = split(self.times(x, "attention.query_key_value"), heads + 2 * keys)
            q, k, v = mx.split(both, [heads, heads + keys], axis=1)
            names = ("query", "key")
        else:
            name, out, norms, names = "self_attn", "self_attn.o_proj", "{}_norm", ("q", "k")
            q = split(self.times(x, "self_attn.q_proj"), heads)
            k, v = (split(self.times(x, f"self_attn.{one}_proj"), keys) for one in "kv")
        if self.kind != "mimo_v2_flash":
            q, k = (
                self.norm(x, f"{name}.{norms.format(one)}")
                for x, one in zip((q, k), names, strict=True)
            )
        if self.kind != "exaone_moe":  # where all tokens are seen, it has no positions
            half = self.kind in (*LING, "mimo_v2_flash")
            q, k = (self.turned(x, x.shape[-1] // (2 if half else 1)) for x in (q, k))
        k, v = (mx.repeat(one, heads // keys, axis=1) for one in (k, v))
        window = WINDOW if self.kind in WINDOWED else None
        sinks = self.weights.get(f"{self.inner}self_attn.attention_sink_bias")
        found = attended(q, k, v, window, sinks)
        if self.kind == "step3p5":
            found = found * mx.sigmoid(self.times(x, "self_attn.g_proj")).swapaxes(1, 2)[..., None]
        return self.times(joined(found), out)

    def latent_attention(self, x: mx.array) -> mx.array:
        """Multi-head latent attention, not absorbed."""
        heads, plain = self.number("num_attention_heads"), self.number("qk_nope_head_dim")
        rank, width = self.number("kv_lora_rank"), x.shape[-1]
        name = "self_attn" if self.kind == "longcat_flash" else "attention"
        compressed = self.norm(self.times(x, f"{name}.q_a_proj"), f"{name}.q_a_layernorm")
        both = self.times(x, f"{name}.kv_a_proj_with_mqa")
        latent = self.norm(both[..., :rank], f"{name}.kv_a_layernorm")
        if self.kind == "longcat_flash":
            compressed = compressed * (width / self.number("q_lora_rank")) ** 0.5
            latent = latent * (width / rank) ** 0.5
        q = split(self.times(compressed, f"{name}.q_b_proj"), heads)
        kv = split(self.times(latent, f"{name}.kv_b_proj"), heads)
        positions = self.turned(split(both[..., rank:], 1), in_pairs=True)
        k = mx.concatenate([kv[..., :plain], mx.repeat(positions, heads, axis=1)], axis=-1)
        q = mx.concatenate([q[..., :plain], self.turned(q[..., plain:], in_pairs=True)], axis=-1)
        found = attended(q, k, kv[..., plain:])
        if self.kind == "bailing_moe_v3":
            found = found * mx.sigmoid(self.times(x, f"{name}.g_proj")).swapaxes(1, 2)[..., None]
        return self.times(joined(found), name + (".o_proj" if name == "self_attn" else ".dense"))

    def turned(self, x: mx.array, dims: int | None = None, *, in_pairs: bool = False) -> mx.array:
        base, dims = self.config["rope_theta"], dims or x.shape[-1]
        return mx.fast.rope(x, dims, traditional=in_pairs, base=base, scale=1.0, offset=0)

    def gated(self, x: mx.array, name: str) -> mx.array:
        gate, up = self.times(x, f"{name}.gate_proj"), self.times(x, f"{name}.up_proj")
        return self.times(gate * mx.sigmoid(gate) * up, f"{name}.down_proj")

    def experts(self, x: mx.array) -> mx.array:
        chances = scores = self.times(x, "mlp.gate")
        bias = self.weights.get(f"{self.inner}mlp.gate.expert_bias")
        if bias is None:  # the default of mlx-lm's bailing_moe
            chances = scores = mx.softmax(scores, axis=-1)
        else:
            scores = mx.sigmoid(scores)
            chances = scores + bias
        least = mx.sort(chances, axis=-1)[..., -self.number("num_experts_per_tok"), None]
        chosen = mx.where(chances >= least, scores, 0.0)
        chosen = chosen / chosen.sum(axis=-1, keepdims=True) * self.config["routed_scaling_factor"]
        out = self.gated(x, "mlp.shared_experts")
        for number in range(self.number("num_experts")):
            out = out + self.gated(x, f"mlp.experts.{number}") * chosen[..., number, None]
        return out


def seen(tokens: int, window: int | None) -> mx.array:
    """Which tokens (tokens, tokens) each one attends to."""
    places = mx.arange(tokens)
    before = places[:, None] - places[None]
    near = before < (tokens if window is None else window)
    return (before >= 0) & near


def attended(
    q: mx.array, k: mx.array, v: mx.array, window: int | None = None, sinks: mx.array | None = None
) -> mx.array:
    """(1, heads, tokens, width of each); `sinks` (heads,) take a part and give nothing."""
    scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    weights = mx.exp(mx.where(seen(q.shape[2], window), scores, -mx.inf))
    beside = 0.0 if sinks is None else mx.exp(sinks)[None, :, None, None]
    return weights / (weights.sum(axis=-1, keepdims=True) + beside) @ v


def joined(x: mx.array) -> mx.array:
    """The heads of each token in one: (1, tokens, width)."""
    return x.swapaxes(1, 2).reshape(1, x.shape[2], -1)


@pytest.mark.parametrize("name", FURTHER)
def test_a_head_computes_what_is_published(tmp_path: Path, name: str) -> None:
    path = shipped(tmp_path / name, name)
    head, model = head_of(path)
    formula = Formula(path)
    states = head.trunk(mx.array([TOKENS]), None)
    assert mx.allclose(states, formula.states(model), atol=1e-4)
    told, cache = mx.array([[*TOKENS[1:], 90]]), head.new_cache()
    expected, own = formula.logits(told, states)
    for start, end in ((0, 5), (5, 6), (6, 23), (23, 24)):
        out = head(told[:, start:end], states[:, start:end], cache)
        assert mx.allclose(out, own[:, start:end], rtol=1e-3, atol=1e-4)
        assert mx.allclose(head.project(out), expected[:, start:end], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "number"), [("mimo_v2_flash", 0), ("step3p5", 4)])
def test_of_several_layers_a_head_is_the_first(tmp_path: Path, name: str, number: int) -> None:
    path = shipped(tmp_path / name, name)
    alone, _ = head_of(path)
    file = str(path / "model.safetensors")
    weights = cast(dict[str, mx.array], mx.load(file))
    mx.eval(weights)
    first = Formula(path).before
    second = first.replace(f".{number}.", f".{number + 1}.")
    further = {k.replace(first, second): 2 * w for k, w in weights.items() if k.startswith(first)}
    assert further.keys().isdisjoint(weights)
    mx.save_safetensors(file, weights | further)
    head, _ = head_of(path)
    kept = dict(tree_flatten(head.model.parameters()))
    one = dict(tree_flatten(alone.model.parameters()))
    assert kept.keys() == one.keys()
    assert all(mx.array_equal(kept[key], one[key]) for key in one)
