"""fla's DeltaNet and Gated DeltaNet language models in NumPy, token by token, from fla's own config and tensors.

Transcribed from fla 0.6.0: models/*/modeling_*.py, layers/{delta_net,gated_deltanet,attn}.py, modules. It knows
nothing of ours.
"""

from typing import Any

import numpy as np

NORM_EPS = 1e-6


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(x, 0)


def rms_norm(x, weight):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + NORM_EPS) * weight


def l2_norm(x):
    return x / np.sqrt(np.sum(x * x, -1, keepdims=True) + 1e-6)


def convolution(x_TD, weight_D1W):
    """torch's conv1d with padding W - 1 on the left: y_t = Σ_j w_j x_{t - (W - 1) + j}."""
    width = weight_D1W.shape[-1]
    padded = np.concatenate([np.zeros((width - 1, x_TD.shape[1]), x_TD.dtype), x_TD])
    return np.stack([np.sum(padded[t : t + width].T * weight_D1W[:, 0], -1) for t in range(len(x_TD))])


class Oracle:
    """logits(tokens_T) [T, vocab] in the given precision."""

    def __init__(self, content: dict[str, Any], tensors: dict[str, np.ndarray], dtype=np.float64):
        self.content = content
        self.tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        self.dtype = dtype

    def logits(self, tokens_T):
        x = self.tensors["model.embeddings.weight"][tokens_T]
        for layer in range(self.content["num_hidden_layers"]):
            weight = lambda name, layer=layer: self.tensors[f"model.layers.{layer}.{name}"]
            spec = self._attention(layer)
            normed = rms_norm(x, weight("attn_norm.weight"))
            x = x + (self._softmax(normed, weight, spec) if spec else self._linear(normed, weight))
            normed = rms_norm(x, weight("mlp_norm.weight"))
            gate, up = normed @ weight("mlp.gate_proj.weight").T, normed @ weight("mlp.up_proj.weight").T
            x = x + (silu(gate) * up) @ weight("mlp.down_proj.weight").T
        head = "model.embeddings.weight" if self.content["tie_word_embeddings"] else "lm_head.weight"
        return rms_norm(x, self.tensors["model.norm.weight"]) @ self.tensors[head].T

    def _attention(self, layer):
        specs = self.content["attn"] or []
        specs = [specs] if isinstance(specs, dict) else specs
        return next((spec for spec in specs if layer in spec["layers"]), None)

    def _linear(self, x, weight):
        content, gated = self.content, self.content["model_type"] == "gated_deltanet"
        q, k, v = (x @ weight(f"attn.{name}_proj.weight").T for name in "qkv")
        if content["use_short_conv"]:
            q, k, v = (convolution(y, weight(f"attn.{n}_conv1d.weight")) for y, n in zip((q, k, v), "qkv", strict=True))
        q, k, v = silu(q), silu(k), silu(v)
        heads = content["num_heads"]
        value_heads = (content["num_v_heads"] or heads) if gated else heads
        q, k = (l2_norm(y.reshape(len(x), heads, -1)) for y in (q, k))
        v = v.reshape(len(x), value_heads, -1)
        beta = sigmoid(x @ weight("attn.b_proj.weight").T)
        decay = np.ones_like(beta)
        if gated:
            logits = x @ weight("attn.a_proj.weight").T
            decay = np.exp(-np.exp(weight("attn.A_log")) * softplus(logits + weight("attn.dt_bias")))
        out = np.zeros_like(v)
        for head in range(value_heads):
            source = head // (value_heads // heads)
            state = np.zeros((k.shape[-1], v.shape[-1]), self.dtype)
            for t in range(len(x)):
                state = decay[t, head] * state
                error = v[t, head] - k[t, source] @ state
                state = state + beta[t, head] * np.outer(k[t, source], error)
                out[t, head] = (q[t, source] * self.dtype(k.shape[-1] ** -0.5)) @ state
        out = rms_norm(out, weight("attn.o_norm.weight"))
        if content["use_gate"]:
            out = out * silu((x @ weight("attn.g_proj.weight").T).reshape(out.shape))
        return out.reshape(len(x), -1) @ weight("attn.o_proj.weight").T

    def _softmax(self, x, weight, spec):
        heads, key_heads = spec["num_heads"], spec["num_kv_heads"]
        dim = self.content["hidden_size"] // heads
        q, k, v = ((x @ weight(f"attn.{name}_proj.weight").T).reshape(len(x), -1, dim) for name in "qkv")
        q, k = self._rotary(q, spec["rope_theta"]), self._rotary(k, spec["rope_theta"])
        out = np.zeros_like(q)
        for head in range(heads):
            source = head // (heads // key_heads)
            for t in range(len(x)):
                first = 0 if spec["window_size"] is None else max(0, t - spec["window_size"] + 1)
                scores = k[first : t + 1, source] @ q[t, head] * self.dtype(dim**-0.5)
                weights = np.exp(scores - scores.max())
                out[t, head] = (weights / weights.sum()) @ v[first : t + 1, source]
        return out.reshape(len(x), -1) @ weight("attn.o_proj.weight").T

    def _rotary(self, x, theta):
        """Not interleaved: the first half of a head's features with the second."""
        half = x.shape[-1] // 2
        angle = np.arange(len(x))[:, None] / theta ** (np.arange(half) * 2 / x.shape[-1])
        cos, sin = np.cos(angle)[:, None].astype(self.dtype), np.sin(angle)[:, None].astype(self.dtype)
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, first * sin + second * cos], -1)
