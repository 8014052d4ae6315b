"""Our logits against those of fla's own modules in PyTorch, on random weights, float32, CPU.

fla's kernels are Triton's and need a GPU; its own naive forms, and PyTorch's, take their places here. What is left of
fla is all that a checkpoint depends on: the modules, their wiring, names, layouts and options.

Needs torch, transformers and flash-linear-attention 0.6: the extra `parity`.
"""

import json
import sys
import warnings

import numpy as np
import pytest

from efla_jax.interop import fla as ours
from tests.interop.checkpoints import CASES
from tests.interop.fla_oracle import Oracle
from tests.interop.test_fla import our_logits
from tests.ops.helpers import EPS, FACTOR, MINIMUM, errors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # torch, triton and transformers have many of their own
]
torch = pytest.importorskip("torch", reason="parity with fla's modules needs torch")
LENGTH = 19


NAMES = (
    "transformers", "fla.layers.attn", "fla.layers.delta_net", "fla.layers.gated_deltanet", "fla.models", "fla.modules",
    "fla.modules.mlp", "fla.modules.rotary.ops", "fla.ops.delta_rule.naive", "fla.ops.gated_delta_rule.naive",
    "fla.ops.gated_delta_rule.gate",
)  # fmt: skip


@pytest.fixture(scope="module")
def modules():
    """fla's modules by name, with plain PyTorch in the place of its kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name: pytest.importorskip(name, reason=f"parity with fla's modules needs {name}") for name in NAMES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(found["fla.layers.delta_net"], "fused_recurrent_delta_rule", _delta_rule)
        patch.setattr(found["fla.layers.gated_deltanet"], "fused_recurrent_gated_delta_rule", _gated_delta_rule)
        patch.setattr(found["fla.layers.gated_deltanet"], "causal_conv1d", _fused_convolution)
        patch.setattr(found["fla.modules"].ShortConvolution, "forward", _convolution)
        patch.setattr(found["fla.modules"].RMSNorm, "forward", _rms_norm)
        patch.setattr(found["fla.modules"].FusedRMSNormGated, "forward", _rms_norm_gated)
        patch.setattr(found["fla.modules"].RotaryEmbedding, "forward", _rotary)
        patch.setattr(found["fla.modules.mlp"], "swiglu", lambda gate, up: torch.nn.functional.silu(gate) * up)
        patch.setattr(found["fla.layers.attn"], "flash_attn_func", _attention)
        yield found


def _model(modules, content):
    """fla's model of this config with its own initial weights, in the form that needs no fused norm and MLP."""
    kind = {"delta_net": "DeltaNet", "gated_deltanet": "GatedDeltaNet"}[content["model_type"]]
    options = {key: value for key, value in content.items() if key not in ("architectures", "model_type", "dtype")}
    config = getattr(modules["fla.models"], f"{kind}Config")(**options | dict(fuse_norm=False, fuse_swiglu=False))
    torch.manual_seed(0)
    return getattr(modules["fla.models"], f"{kind}ForCausalLM")(config).eval()


def _unit(x):
    """What use_qk_l2norm_in_kernel does, ops/gated_delta_rule/fused_recurrent.py:119."""
    return x / torch.sqrt(torch.sum(x * x, -1, keepdim=True) + 1e-6)


def _delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel, **_):
    assert use_qk_l2norm_in_kernel
    recurrence = sys.modules["fla.ops.delta_rule.naive"].delta_rule_recurrence
    out, state = recurrence(*(x.transpose(1, 2) for x in (_unit(q), _unit(k), v, beta)))
    return out.transpose(1, 2), state


def _gated_delta_rule(q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval, **flags):
    needed = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")
    assert all(flags[name] for name in needed)
    assert not allow_neg_eigval
    groups = v.shape[2] // k.shape[2]  # value head h reads key head h // groups, fused_recurrent.py:70
    q, k = (_unit(x).repeat_interleave(groups, dim=2) for x in (q, k))
    decay = sys.modules["fla.ops.gated_delta_rule.gate"].naive_gdn_gate(g, A_log, dt_bias)
    recurrence = sys.modules["fla.ops.gated_delta_rule.naive"].naive_recurrent_gated_delta_rule
    return recurrence(q, k, v, torch.sigmoid(beta), decay)


def _convolution(self, x, **_):
    y = torch.nn.Conv1d.forward(self, x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
    assert self.activation == "silu"
    return torch.nn.functional.silu(y), None


def _fused_convolution(x, weight, bias, activation, **_):
    """Of query, key and value at once: x [B, T, D], weight [D, W]."""
    assert (bias, activation) == (None, "silu")
    y = torch.nn.functional.conv1d(x.transpose(1, 2), weight[:, None], padding=weight.shape[1] - 1, groups=len(weight))
    return torch.nn.functional.silu(y[..., : x.shape[1]].transpose(1, 2)), None


def _rms_norm(self, x):
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def _rms_norm_gated(self, x, g):
    assert self.activation in ("swish", "silu")
    return _rms_norm(self, x) * torch.nn.functional.silu(g)


def _rotary(self, q, k, **_):
    angle = torch.outer(torch.arange(q.shape[1], dtype=torch.float32), self.inv_freq)
    assert not self.interleaved
    rotate = sys.modules["fla.modules.rotary.ops"].rotary_embedding_ref
    return tuple(rotate(x, torch.cos(angle), torch.sin(angle)) for x in (q, k))


def _attention(q, k, v, causal, window_size):
    """flash_attn_func: [B, T, H, D], window_size tokens to the left and right, -1 for all."""
    assert causal
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    mask = (distance >= 0) & (distance <= (length if window_size[0] < 0 else window_size[0]))
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_flas_modules(modules, tmp_path, name):
    """fla's error is that of one more float32 computation, so ours may differ by FACTOR roundings of each."""
    content = CASES[name]
    model = _model(modules, content)
    with torch.no_grad():  # so that every parameter matters
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.5))
    model.save_pretrained(tmp_path / "fla")
    tensors = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    tokens = np.random.default_rng(1).integers(0, content["vocab_size"], LENGTH).astype(np.int32)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens[None]).long(), use_cache=False).logits[0].numpy()

    loaded, params, _ = ours.load(tmp_path / "fla")
    written = json.loads((tmp_path / "fla" / "config.json").read_text())
    want = {"logits": Oracle(written, tensors).logits(tokens)}
    rounding = errors({"logits": Oracle(written, tensors, np.float32).logits(tokens)}, want)["logits"]
    allowed = FACTOR * max(rounding, MINIMUM * EPS)
    assert errors({"logits": theirs}, want)["logits"] <= allowed  # the oracle of the other tests is fla's function
    assert errors({"logits": our_logits(loaded, params, tokens)}, want)["logits"] <= allowed
    distance = errors({"logits": our_logits(loaded, params, tokens)}, {"logits": theirs.astype(np.float64)})["logits"]
    assert distance <= 2 * allowed


def test_fla_loads_what_we_save(modules, tmp_path):
    """Through transformers' own loader, which warns of nothing missing or unexpected; the logits are the same bits."""
    model = _model(modules, CASES["gated_deltanet"])
    model.save_pretrained(tmp_path / "fla")
    ours.save(tmp_path / "back", *ours.load(tmp_path / "fla"))
    back, report = modules["transformers"].AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True, fuse_norm=False, fuse_swiglu=False
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(LENGTH)[None]
    with torch.no_grad():
        want, got = (m(tokens, use_cache=False).logits for m in (model, back.eval()))
    assert torch.equal(want, got)
