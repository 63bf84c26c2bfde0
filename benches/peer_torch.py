#!/usr/bin/env python3
"""Hadal against torch on this machine: the same model, the same batch, in one go.

    python benches/peer_torch.py --hadal target/release/hadal --scene scenes/quickstart.ron --rounds 3 --json ratio.json

Needs torch and transformers (versions: tests/oracle/requirements.txt). `hadal bench train --scene S --no-mtp --json -` prints a
JSON document with its model's config in Hugging Face form and its own speed; this script builds DeepseekV3ForCausalLM from that
config and times it. transformers trains without multi-token prediction, so Hadal is asked to do the same.

torch gets every advantage that a user could reach without writing kernels:

- training: AdamW fused, forward + backward + clip + step; float32 and bfloat16 autocast; the expert implementations of
  transformers that run here (grouped_mm, eager, ...). The fastest combination is its result.
- generation: batch 1, a raw greedy loop with a key/value cache (faster than `generate()`); float32 and bfloat16 weights; each
  expert implementation; one thread and several. The fastest combination is its result.

A first pass tries all combinations; then torch (its fastest combination) and Hadal alternate for --rounds rounds, so that noise
on the machine meets both. The table shows the median of each, and the median of the ratios of the rounds.

Run it on a quiet machine: the threads of torch wait by spinning, so that on a busy one torch loses many times more than its
share, and the ratio flatters Hadal. The load is printed and kept in the JSON, with a warning above half a core.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

EXPERTS = ["grouped_mm", "eager", "batched_mm"]  # names of transformers; batched_mm copies weights: generation only
PROMPT_TOKENS = 16


def build(config_json, dtype, experts):
    config = dict(config_json)
    for key in ("num_nextn_predict_layers", "num_mtp_layers", "quantization_config"):
        config.pop(key, None)
    config["num_nextn_predict_layers"] = 0
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
    model.set_experts_implementation(experts)
    return model


def training(config, batch, seq_len, experts, autocast, steps, warmup):
    """Seconds of each of `steps` optimizer steps."""
    model = build(config, torch.float32, experts).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)
    secs = []
    for step in range(warmup + steps):
        tokens = torch.randint(0, config["vocab_size"], (batch, seq_len), generator=generator)
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step >= warmup:
            secs.append(time.perf_counter() - start)
    assert torch.isfinite(loss), "the peer's loss is not finite"
    return secs


@torch.inference_mode()
def generation(config, num_tokens, experts, dtype):
    """Tokens per second of greedy decoding at batch 1, from the median token; prompt and first quarter are left out."""
    model = build(config, dtype, experts).eval()
    step = torch.randint(0, config["vocab_size"], (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    cache, secs = None, []
    for _ in range(1 + num_tokens):
        start = time.perf_counter()
        out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, step = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        secs.append(time.perf_counter() - start)
    return 1 / statistics.median(secs[1 + num_tokens // 4 :])


def fastest(kind, candidates, measure):
    """The candidate with the most tokens per second; those that do not run here are said and skipped."""
    speeds = {}
    for label, arguments in candidates.items():
        try:
            speeds[label] = measure(**arguments)
            print(f"  torch {kind}, {label}: {speeds[label]:,.1f} tokens/s", file=sys.stderr)
        except (RuntimeError, NotImplementedError, KeyError, ValueError) as error:
            print(f"  torch {kind}, {label}: does not run here ({str(error).splitlines()[0]})", file=sys.stderr)
    if not speeds:
        sys.exit(f"peer_torch: no {kind} candidate runs")
    return max(speeds, key=speeds.get), speeds


def run_hadal(hadal, scene, extra):
    command = [hadal, "bench", "train", "--scene", scene, "--no-mtp", "--json", "-", *extra]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"peer_torch: {' '.join(command)} ended with exit code {done.returncode}")
    result = json.loads(done.stdout)
    missing = {"config", "tokens_per_step", "seq_len", "train_tokens_per_sec"} - result.keys()
    if missing:
        sys.exit(f"peer_torch: {' '.join(command)} printed no {', '.join(sorted(missing))}")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hadal", required=True, help="the hadal binary")
    parser.add_argument("--scene", required=True, help="a scene of a deepseek_v3 model")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of torch, then Hadal (default 3)")
    parser.add_argument("--steps", type=int, default=5, help="measured training steps of torch per round (default 5)")
    parser.add_argument("--warmup", type=int, default=2, help="training steps before them (default 2)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--new-tokens", type=int, default=128, help="generated tokens, where Hadal names no number (default 128)")
    parser.add_argument("--hadal-arg", action="append", default=[], help="one more argument for hadal (repeatable)")
    parser.add_argument("--json", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"peer_torch: warning: load average {load:.1f}: the ratio is not a result, it flatters Hadal", file=sys.stderr)

    first = run_hadal(args.hadal, args.scene, args.hadal_arg)
    config, seq_len, tokens_per_step = first["config"], first["seq_len"], first["tokens_per_step"]
    if tokens_per_step % seq_len:
        sys.exit(f"peer_torch: tokens_per_step {tokens_per_step} is not a multiple of seq_len {seq_len}")
    batch = tokens_per_step // seq_len
    num_tokens = first.get("generate_num_tokens") or args.new_tokens
    generates = first.get("generate_tokens_per_sec") is not None
    num_parameters = sum(p.numel() for p in build(config, torch.float32, "eager").parameters())
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.threads} threads", file=sys.stderr)
    print(f"{num_parameters:,} parameters, batch {batch} x {seq_len}", file=sys.stderr)

    def train_speed(experts, autocast):
        secs = training(config, batch, seq_len, experts, autocast, args.steps, args.warmup)
        return tokens_per_step / statistics.median(secs)

    def generate_speed(experts, dtype, threads):
        torch.set_num_threads(threads)
        try:
            return generation(config, num_tokens, experts, dtype)
        finally:
            torch.set_num_threads(args.threads)

    train_candidates = {
        f"{'bf16 autocast' if autocast else 'f32'}, {experts}": dict(experts=experts, autocast=autocast)
        for autocast in (False, True)
        for experts in EXPERTS[:2]
    }
    best_train, train_all = fastest("training", train_candidates, train_speed)
    if generates:
        generate_candidates = {
            f"{str(dtype)[6:]}, {experts}, {threads} thread{'s' * (threads > 1)}": dict(experts=experts, dtype=dtype, threads=threads)
            for dtype in (torch.float32, torch.bfloat16)
            for experts in EXPERTS
            for threads in sorted({1, args.threads})
        }
        best_generate, generate_all = fastest("generation", generate_candidates, generate_speed)

    rounds = []
    for number in range(args.rounds):
        row = {"torch_train": train_speed(**train_candidates[best_train])}
        if generates:
            row["torch_generate"] = generate_speed(**generate_candidates[best_generate])
        ours = run_hadal(args.hadal, args.scene, args.hadal_arg)
        row["hadal_train"] = ours["train_tokens_per_sec"]
        if generates:
            row["hadal_generate"] = ours["generate_tokens_per_sec"]
        rounds.append(row)
        print(f"  round {number + 1}: " + ", ".join(f"{k} {v:,.1f}" for k, v in row.items()), file=sys.stderr)

    result = {
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "num_threads": args.threads,
        "load_average_at_start": load,
        "num_parameters": num_parameters,
        "num_sequences": batch,
        "seq_len": seq_len,
        "num_rounds": args.rounds,
        "train": summary("train", best_train, train_all, rounds),
    }
    if generates:
        result["generate"] = summary("generate", best_generate, generate_all, rounds)
    print(f"{'':10}  {'torch tok/s':>12}  {'hadal tok/s':>12}  {'hadal/torch':>11}  torch's fastest")
    for kind in ("train", "generate"):
        if kind in result:
            r = result[kind]
            speeds = f"{r['torch_tokens_per_sec']:>12,.1f}  {r['hadal_tokens_per_sec']:>12,.1f}"
            print(f"{kind:10}  {speeds}  {r['ratio']:>11.2f}  {r['torch_fastest']}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def summary(kind, best, tried, rounds):
    torch_speeds, hadal_speeds = [r[f"torch_{kind}"] for r in rounds], [r[f"hadal_{kind}"] for r in rounds]
    return {
        "torch_tokens_per_sec": statistics.median(torch_speeds),
        "hadal_tokens_per_sec": statistics.median(hadal_speeds),
        "ratio": statistics.median(h / t for h, t in zip(hadal_speeds, torch_speeds)),
        "torch_fastest": best,
        "torch_tried_tokens_per_sec": tried,
        "rounds": [{"torch_tokens_per_sec": t, "hadal_tokens_per_sec": h} for t, h in zip(torch_speeds, hadal_speeds)],
    }


if __name__ == "__main__":
    main()
