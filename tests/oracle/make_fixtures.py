#!/usr/bin/env python3
"""Writes the oracle fixtures: tiny models whose numbers come from Hugging Face transformers, not from Hadal.

    python -m venv venv && venv/bin/pip install -r requirements.txt
    venv/bin/python make_fixtures.py --out fixtures

Each case becomes a folder (see README.md for the tensors in it). The order of the work, per case:

1. Draw weights and tokens from a fixed seed. Linear weights have variance 1 / fan_in and the final norm is close to one, so
   that logits have a standard deviation near 1 and every part of the model matters. Norm weights are not all ones and biases
   are not zero, so that a part that is left out shows.
2. Run in float32, as a user of transformers would: `logits`, `loss`, `generated`.
3. Run the same float32 weights in float64: gradients and AdamW losses. transformers casts to float32 inside norms, routers,
   rotary embeddings, softmax and the loss whatever the model's dtype is; `Float64` below turns these casts into float64 and
   fails if a float32 tensor appears anywhere. A finite difference of the loss then confirms the gradients to 1e-7.
4. Check that the fixture is fair (no near ties in a top-k, same experts whether masked groups are filled with 0 or -inf) and
   useful (typical mistakes move the logits far beyond any tolerance).

The script is deterministic: a second run writes the same bytes on the same machine, and on another machine it differs by rounding.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

BATCH, SEQ = 2, 24
PROMPT, NEW_TOKENS = 8, 12
ADAMW_STEPS = 20
ADAMW = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
WEIGHT_DECAY = 0.1
MIN_GAP = 3e-4  # smallest distance allowed between the last chosen score and the first one left out
MIN_GAP_TRAINING = 9e-5  # the same, over the AdamW steps
MIN_GREEDY_MARGIN = 1e-3  # between the two best logits of every greedy step

YARN_V3 = dict(type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1)

# The configs carry the keys of the configs on the Hugging Face hub, `rope_theta` and `rope_scaling` included.
DEEPSEEK = dict(
    vocab_size=97, hidden_size=32, intermediate_size=40, moe_intermediate_size=8, hidden_act="silu",
    num_attention_heads=4, num_key_value_heads=4, attention_bias=False, attention_dropout=0.0,
    kv_lora_rank=14, qk_nope_head_dim=8, qk_rope_head_dim=16, v_head_dim=12, n_routed_experts=8, moe_layer_freq=1, ep_size=1,
    initializer_range=0.02, bos_token_id=0, eos_token_id=1, use_cache=True, rope_theta=10000.0,
)  # fmt: skip
V3 = DEEPSEEK | dict(
    model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"], scoring_func="sigmoid", topk_method="noaux_tc",
    norm_topk_prob=True, n_group=4, topk_group=2, num_nextn_predict_layers=0,
)  # fmt: skip
V2 = DEEPSEEK | dict(
    model_type="deepseek_v2", architectures=["DeepseekV2ForCausalLM"], scoring_func="softmax", norm_topk_prob=False,
)  # fmt: skip
QWEN2 = dict(
    model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=97, hidden_act="silu", attention_dropout=0.0,
    max_position_embeddings=32768, rms_norm_eps=1e-6, initializer_range=0.02, bos_token_id=0, eos_token_id=1, use_cache=True,
    use_sliding_window=False, sliding_window=32768, max_window_layers=2, rope_scaling=None,
)  # fmt: skip



def drop_biases(model):
    for name, tensor in list(model.named_parameters()) + list(model.named_buffers()):
        if name.endswith("bias"):
            tensor.data.zero_()


def latent_norms_with_config_eps(model):
    for layer in model.model.layers:
        layer.self_attn.kv_a_layernorm.variance_epsilon = model.config.rms_norm_eps


# name -> (seed, config in hub form, mistakes: label -> what amounts to it, a change of the config or of the built model)
CASES = {
    # DeepSeek-V3 and R1. mscale differs from mscale_all_dim, so that cos and sin are scaled too (attention_factor != 1).
    "deepseek_v3_qlora": (
        0,
        V3 | dict(
            num_hidden_layers=4, first_k_dense_replace=2, q_lora_rank=20, n_shared_experts=1, num_experts_per_tok=3,
            routed_scaling_factor=2.5, rms_norm_eps=1e-6, max_position_embeddings=163840, tie_word_embeddings=False,
            rope_scaling=YARN_V3 | dict(mscale=1.0, mscale_all_dim=0.8),
        ),
        {
            "half-split rope": dict(rope_interleave=False),
            "no groups": dict(topk_group=4),
            "weights not normalized": dict(norm_topk_prob=False),
            "no routed_scaling_factor": dict(routed_scaling_factor=1.0),
            "no mscale in the softmax scale": dict(rope_scaling=YARN_V3 | dict(mscale=1.0, attention_factor=1.056966257)),
            "cos and sin not scaled": dict(rope_scaling=YARN_V3 | dict(mscale_all_dim=0.8, attention_factor=1.0)),
            "no YaRN": dict(rope_scaling=None),
            "no e_score_correction_bias": drop_biases,
        },
    ),
    # Moonlight-like: no query compression, two shared experts. rms_norm_eps is large on purpose: see "latent norm" in README.md.
    "deepseek_v3_noqlora": (
        34,
        V3 | dict(
            num_hidden_layers=3, first_k_dense_replace=1, q_lora_rank=None, n_shared_experts=2, num_experts_per_tok=3,
            routed_scaling_factor=2.446, rms_norm_eps=1e-3, max_position_embeddings=8192, tie_word_embeddings=True,
            rope_theta=50000.0, rope_scaling=None,
        ),
        {
            "half-split rope": dict(rope_interleave=False),
            "no groups": dict(topk_group=4),
            "weights not normalized": dict(norm_topk_prob=False),
            "rms_norm_eps 1e-6 in the layer norms": dict(rms_norm_eps=1e-6),
            "rms_norm_eps in the latent norm": latent_norms_with_config_eps,
            "no e_score_correction_bias": drop_biases,
        },
    ),
    # DeepSeek-V2-Lite without YaRN.
    "deepseek_v2": (
        2,
        V2 | dict(
            num_hidden_layers=2, first_k_dense_replace=1, q_lora_rank=None, n_shared_experts=2, num_experts_per_tok=3,
            topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0, rms_norm_eps=1e-6,
            max_position_embeddings=2048, tie_word_embeddings=False, rope_scaling=None,
        ),
        {"top-2 instead of top-3": dict(num_experts_per_tok=2), "rope_theta 50000": dict(rope_theta=50000.0)},
    ),
    # DeepSeek-V2 236B. A short original context, so that the ramp of YaRN starts at its lower clamp.
    "deepseek_v2_grouped": (
        25,
        V2 | dict(
            num_hidden_layers=2, first_k_dense_replace=1, q_lora_rank=20, n_shared_experts=2, num_experts_per_tok=3,
            topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0, rms_norm_eps=1e-6,
            max_position_embeddings=2560, tie_word_embeddings=False,
            rope_scaling=dict(type="yarn", factor=40, original_max_position_embeddings=64, beta_fast=32, beta_slow=1,
                              mscale=0.707, mscale_all_dim=0.707),
        ),
        {
            "no groups": dict(topk_method="greedy"),
            "no routed_scaling_factor": dict(routed_scaling_factor=1.0),
            "no YaRN": dict(rope_scaling=None),
        },
    ),
    # Qwen2.5 0.5B to 3B, and R1-Distill-Qwen-1.5B but for its untied head: grouped queries, q/k/v biases.
    "qwen2": (
        0,
        QWEN2 | dict(
            hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            rope_theta=1000000.0, tie_word_embeddings=True,
        ),
        {"rope_theta 10000": dict(rope_theta=10000.0), "no biases": drop_biases},
    ),
    # Five heads on one key/value head, and an untied head.
    "qwen2_untied": (
        0,
        QWEN2 | dict(
            hidden_size=40, intermediate_size=48, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=1,
            rope_theta=10000.0, tie_word_embeddings=False,
        ),
        {"rope_theta 1000000": dict(rope_theta=1000000.0), "no biases": drop_biases},
    ),
}  # fmt: skip


class Float64(TorchFunctionMode):
    """Inside, a cast to float32 is a cast to float64, and a float32 result is an error."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(value):
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        out = func(*(widen(a) for a in args), **{k: widen(v) for k, v in (kwargs or {}).items()})
        if isinstance(out, torch.Tensor) and out.dtype in (torch.float32, torch.complex64):
            raise TypeError(f"{func} returned {out.dtype} inside the float64 run")
        return out

    def __enter__(self):
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error):
        torch.set_default_dtype(torch.float32)
        return super().__exit__(*error)


def build(config_dict, weights=None, double=False):
    """A model with the plain implementations (no fused attention, a loop over experts), optionally with given weights."""
    kwargs = {k: v for k, v in config_dict.items() if v is not None or k == "q_lora_rank"}
    # transformers fills nested dicts of a config in place: give it its own copy.
    config = AutoConfig.for_model(**json.loads(json.dumps(kwargs)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    if hasattr(config, "n_routed_experts"):
        model.set_experts_implementation("eager")
    if weights is not None:
        model.load_state_dict(weights)
    return (model.double() if double else model).eval()


def draw_weights(model, seed):
    """Weights from numpy's PCG64, in the order of the model's parameters and buffers."""
    rng = np.random.default_rng(seed)
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, tensor in list(model.named_parameters()) + list(model.named_buffers()):
            shape = tuple(tensor.shape)
            if name.endswith("inv_freq"):
                continue
            if name.endswith("e_score_correction_bias"):
                # As wide as the differences between scores, but hardly negative: s + bias must stay above 0 (see Probe.check).
                value = rng.uniform(-0.03, 0.27, shape)
            elif name.endswith("norm.weight"):
                value = 1.0 + 0.2 * rng.standard_normal(shape)
            elif name.endswith("bias"):
                value = 0.3 * rng.standard_normal(shape)
            elif name.endswith("embed_tokens.weight") and not tied:
                value = rng.standard_normal(shape)
            else:  # linear layers, router, packed experts: the last dimension is the input
                value = rng.standard_normal(shape) / math.sqrt(shape[-1])
            tensor.copy_(torch.from_numpy(np.asarray(value, dtype=np.float32)))
    return rng.integers(0, model.config.vocab_size, (BATCH, SEQ))


def unpack(tensors):
    """Packed expert tensors of transformers 5 -> one tensor per expert, with the names on the hub."""
    out = {}
    for name, tensor in tensors.items():
        if ".mlp.experts." not in name:
            out[name] = tensor
            continue
        prefix, kind = name.rsplit(".", 1)
        for expert, matrix in enumerate(tensor):
            if kind == "gate_up_proj":
                gate, up = matrix.chunk(2)
                out[f"{prefix}.{expert}.gate_proj.weight"] = gate
                out[f"{prefix}.{expert}.up_proj.weight"] = up
            else:
                out[f"{prefix}.{expert}.{kind}.weight"] = matrix
    return out


class Probe:
    """Keeps the residual stream after every layer and the output of every router of the last forward pass."""

    def __init__(self, model):
        self.hidden, self.routers, self.gates = {}, {}, {}
        model.model.embed_tokens.register_forward_hook(lambda m, i, out: self.hidden.__setitem__(0, out.detach()))
        for n, layer in enumerate(model.model.layers):
            layer.register_forward_hook(lambda m, i, out, n=n: self.hidden.__setitem__(n + 1, out.detach()))
            if hasattr(layer.mlp, "gate"):
                self.gates[n] = layer.mlp.gate
                layer.mlp.gate.register_forward_hook(
                    lambda m, i, out, n=n: self.routers.__setitem__(n, tuple(t.detach() for t in out))
                )

    def chosen(self):
        """Per layer: expert ids in ascending order, and their weights."""
        result = {}
        for n, (_, weights, indices) in self.routers.items():
            ids, order = indices.sort(dim=-1)
            result[n] = ids, weights.gather(-1, order)
        return result

    def check(self, config, gap_allowed):
        """Recomputes every choice from the router's logits, with both fills, and returns the smallest gap seen."""
        smallest = math.inf
        for n, (logits, _, indices) in self.routers.items():
            top_k, groups, kept = config.num_experts_per_tok, config.n_group, config.topk_group
            if config.model_type == "deepseek_v3":
                scores = logits.sigmoid() + self.gates[n].e_score_correction_bias
                by_group = scores.view(len(scores), groups, -1).topk(2, dim=-1).values.sum(-1)
            else:
                scores = logits.softmax(-1)
                by_group = scores.view(len(scores), groups, -1).amax(-1)
            mask = torch.ones_like(scores, dtype=torch.bool)
            if config.topk_method != "greedy":
                ranked = by_group.sort(dim=-1, descending=True)
                smallest = min(smallest, (ranked.values[:, kept - 1] - ranked.values[:, kept]).min().item())
                keep = torch.zeros_like(by_group, dtype=torch.bool).scatter_(1, ranked.indices[:, :kept], True)
                mask = keep.repeat_interleave(scores.shape[1] // groups, dim=1)
            for fill in (-math.inf, 0.0):
                ranked = scores.masked_fill(~mask, fill).sort(dim=-1, descending=True)
                same = ranked.indices[:, :top_k].sort(-1).values == indices.sort(-1).values
                assert same.all(), f"layer {n}: filling masked groups with {fill} changes the chosen experts"
                smallest = min(smallest, (ranked.values[:, top_k - 1] - ranked.values[:, top_k]).min().item())
            assert scores[mask].min() > 0, f"layer {n}: a candidate's score is not positive"
        assert smallest > gap_allowed, f"near tie in a router: {smallest:.1e}"
        return smallest


def greedy(model, prompt):
    """Greedy continuation with a key/value cache, and the smallest margin between the two best logits."""
    ids, cache, step, margin = prompt, None, prompt, math.inf
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            best = out.logits[:, -1].topk(2)
            margin = min(margin, (best.values[:, 0] - best.values[:, 1]).min().item())
            step = best.indices[:, :1]
            ids = torch.cat([ids, step], dim=1)
    assert margin > MIN_GREEDY_MARGIN, f"near tie in greedy decoding: {margin:.1e}"
    return ids


def gradients(config_dict, weights, tokens):
    """Loss, logits and gradients in float64, confirmed by one finite difference along a random direction."""
    model = build(config_dict, weights, double=True)
    probe = Probe(model)

    def loss():
        with Float64():
            return model(input_ids=tokens, labels=tokens, use_cache=False)

    out = loss()
    routing = probe.chosen()
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}

    rng = np.random.default_rng(1)
    # Along the gradient plus a random part of the same size, parameter by parameter.
    random = {n: torch.from_numpy(rng.standard_normal(tuple(g.shape))) for n, g in grads.items()}
    direction = {n: g + random[n] * g.norm() / math.sqrt(g.numel()) for n, g in grads.items()}
    expected = sum((direction[n] * grads[n]).sum() for n in grads).item()
    h, losses = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2, 1):
            for n, p in model.named_parameters():
                p.add_(sign * h * direction[n])
            losses.append(loss().loss.item())
    measured = (losses[0] - losses[1]) / (2 * h)
    assert abs(measured - expected) < 1e-7 * abs(expected), f"finite difference {measured}, gradient {expected}"
    return out.loss.item(), out.logits.detach(), grads, routing


def train(config_dict, weights, tokens, double):
    """Losses before each of the AdamW steps, and the smallest gap in any router on the way."""
    model = build(config_dict, weights, double)
    probe = Probe(model)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=decay, weight_decay=WEIGHT_DECAY), dict(params=plain, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, foreach=False, **ADAMW)
    losses, choices, gap = [], [], math.inf
    for _ in range(ADAMW_STEPS):
        optimizer.zero_grad()
        if double:
            with Float64():
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        else:
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        gap = min(gap, probe.check(model.config, MIN_GAP_TRAINING)) if double else gap
        choices.append({n: ids for n, (ids, _) in probe.chosen().items()})
    return losses, choices, gap


def same_choices(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


def f32(tensor):
    return tensor.detach().to(torch.float32).contiguous().clone()


def make_case(name, seed, config_dict, mistakes, out):
    model = build(config_dict)
    tokens = torch.from_numpy(draw_weights(model, seed))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    probe = Probe(model)

    # float32, as transformers runs it
    with torch.no_grad():
        result = model(input_ids=tokens, labels=tokens, use_cache=False)
    logits, loss, hidden, routing = result.logits, result.loss.item(), dict(probe.hidden), probe.chosen()
    gap = probe.check(model.config, MIN_GAP)
    generated = greedy(model, tokens[:1, :PROMPT])

    # float64
    loss64, logits64, grads, routing64 = gradients(config_dict, weights, tokens)
    losses64, choices64, gap_training = train(config_dict, weights, tokens, double=True)
    losses32, choices32, _ = train(config_dict, weights, tokens, double=False)
    for n in routing:
        assert torch.equal(routing[n][0], routing64[n][0]), "float32 and float64 choose different experts"
    assert all(same_choices(a, b) for a, b in zip(choices32, choices64)), "float32 and float64 choose different experts in training"
    assert not torch.equal(tokens[0], tokens[1]) and 0.8 < logits.std() < 1.3, f"logits std {logits.std()}"
    assert all(g.abs().max() > 0 for g in unpack(grads).values()), "a parameter has no gradient"

    # mistakes must show
    shown = {}
    for label, mistake in mistakes.items():
        wrong = build(config_dict | (mistake if isinstance(mistake, dict) else {}), weights)
        if callable(mistake):
            mistake(wrong)
        with torch.no_grad():
            shown[label] = (wrong(input_ids=tokens, use_cache=False).logits - logits).abs().max().item()
        assert shown[label] > 3e-4, f"{label} moves the logits by {shown[label]:.1e} only"

    # write
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    hub = json.dumps(config_dict | dict(torch_dtype="float32"), indent=2, sort_keys=True)
    (folder / "config_hub.json").write_text(hub + "\n")
    named = unpack(dict(model.named_parameters()))
    check_saved(folder, named, weights, tokens, logits)
    save_file({"input_ids": tokens}, folder / "tokens.safetensors")
    expected = {
        "logits": f32(logits),
        "loss": torch.tensor([loss], dtype=torch.float32),
        "adamw_losses": torch.tensor(losses64, dtype=torch.float32),
        "adamw_losses_f32": torch.tensor(losses32, dtype=torch.float32),
        "generated": generated.contiguous(),
    }
    expected |= {f"grad.{n}": f32(g) for n, g in unpack(grads).items()}
    save_file(expected, folder / "expected.safetensors")
    debug = {f"hidden.{n}": f32(h) for n, h in sorted(hidden.items())}
    for n, (ids, gate_weights) in routing.items():
        debug[f"experts.{n}"] = ids.contiguous()
        debug[f"gate_weights.{n}"] = f32(gate_weights)
    debug["inv_freq"] = f32(model.model.rotary_emb.inv_freq)
    save_file(debug, folder / "debug.safetensors")

    report(name, folder, loss, loss64, logits, logits64, losses32, losses64, gap, gap_training, shown, grads, model)


def check_saved(folder, named, weights, tokens, logits):
    """The files load back to the same numbers, under the names of the hub, from either form of the config."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        saved = {k: file.get_tensor(k) for k in file.keys()}
    buffers = {k: v for k, v in weights.items() if k.endswith("e_score_correction_bias")}
    assert saved.keys() == named.keys() | buffers.keys(), saved.keys() ^ (named.keys() | buffers.keys())
    for key, tensor in (named | buffers).items():
        assert torch.equal(saved[key], tensor), key
    for config in ("config.json", "config_hub.json"):
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, config=AutoConfig.from_pretrained(folder / config), attn_implementation="eager"
        )
        with torch.no_grad():
            again = loaded.eval()(input_ids=tokens, use_cache=False).logits
        # Not bit for bit: the default implementation of the experts is another one.
        assert (again - logits).abs().max() < 1e-4, f"{config}: {(again - logits).abs().max()}"


def report(name, folder, loss, loss64, logits, logits64, losses32, losses64, gap, gap_training, shown, grads, model):
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"\n{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {size / 1024:.0f} KiB")
    off = (logits - logits64).abs().max()
    print(f"  loss {loss:.6f} (f64 {loss64:.8f}), logits std {logits.std():.3f}, max |f32 - f64| {off:.1e}")
    off = max(abs(a - b) for a, b in zip(losses32, losses64))
    print(f"  adamw {losses64[0]:.5f} -> {losses64[-1]:.5f}, max |f32 - f64| {off:.1e}")
    norms = {n: g.norm().item() for n, g in unpack(grads).items()}
    least, most = min(norms, key=norms.get), max(norms, key=norms.get)
    print(f"  gradient norms {norms[least]:.1e} ({least}) to {norms[most]:.1e} ({most})")
    if gap < math.inf:
        print(f"  smallest gap in a router {gap:.1e}, over training {gap_training:.1e}")
    scale, factor = model.model.layers[0].self_attn.scaling, model.model.rotary_emb.attention_scaling
    print(f"  softmax scale {scale:.9f}, cos/sin factor {factor:.9f}")
    for label, moved in shown.items():
        print(f"  mistake: {label}: logits move by {moved:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "fixtures", help="folder to write (default: fixtures)")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this case (repeatable)")
    parser.add_argument("--seed", type=int, help="another seed, to look for one without near ties")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for name in args.case or CASES:
        seed, config_dict, mistakes = CASES[name]
        make_case(name, seed if args.seed is None else args.seed, config_dict, mistakes, args.out)
    total = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"\ntotal {total / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
