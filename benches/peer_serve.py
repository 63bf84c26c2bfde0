#!/usr/bin/env python3
"""Hadal's answers against transformers' `generate` on this machine: the same model, as many prompts at a time, in one go.

    hadal run scenes/quickstart.ron --set train.steps=1 --set 'name="peer"'     # weights need not be good
    python benches/peer_serve.py --hadal target/release/hadal --checkpoint runs/peer/latest --rounds 3 --json ratio.json

Both answer prompts of 16 random tokens with --new-tokens tokens, greedily; speeds are generated tokens over the whole time, prompts
included. transformers gets float32 and bfloat16, each implementation of experts that runs here, and one thread or all; for each batch the
fastest is its result. Hadal is `hadal bench serve` in f32 and bf16. Then both alternate for --rounds rounds. Run it on a quiet machine, as
`peer_torch.py` says.
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

from peer_torch import EXPERTS, build, fastest

PROMPT_TOKENS = 16


@torch.inference_mode()
def generate(config, batch, num_tokens, experts, dtype, threads):
    """Generated tokens per second of `generate`, the better of two calls."""
    torch.set_num_threads(threads)
    model = build(config, dtype, experts).eval()
    prompt = torch.randint(0, config["vocab_size"], (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    secs = []
    for _ in range(2):
        start = time.perf_counter()
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        secs.append(time.perf_counter() - start)
    assert out.shape == (batch, PROMPT_TOKENS + num_tokens)
    return batch * num_tokens / min(secs)


def hadal(args, concurrency, precision, requests):
    command = [args.hadal, "bench", "serve", args.checkpoint, "--concurrency", str(concurrency), "--requests", str(requests)]
    command += ["--prompt-tokens", str(PROMPT_TOKENS), "--new-tokens", str(args.new_tokens), "--precision", precision, "--json", "-"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"peer_serve: {' '.join(command)} ended with exit code {done.returncode}")
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hadal", required=True, help="the hadal binary")
    parser.add_argument("--checkpoint", required=True, help="a checkpoint of a deepseek_v3 model")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of torch, then Hadal (default 3)")
    parser.add_argument("--new-tokens", type=int, default=64, help="generated tokens of an answer (default 64)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts at a time (default 1 8)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--json", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"peer_serve: warning: load average {load:.1f}: the ratio is not a result, it flatters Hadal", file=sys.stderr)
    config = json.loads((Path(args.checkpoint) / "config.json").read_text())
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.threads} threads", file=sys.stderr)
    candidates = {
        f"{str(dtype)[6:]}, {experts}, {threads} thread{'s' * (threads > 1)}": dict(experts=experts, dtype=dtype, threads=threads)
        for dtype in (torch.float32, torch.bfloat16)
        for experts in EXPERTS
        for threads in sorted({1, args.threads})
    }
    result = {"torch_version": torch.__version__, "transformers_version": transformers.__version__, "load_average_at_start": load}
    result["batches"] = []
    for batch in args.batches:
        measure = lambda **candidate: generate(config, batch, args.new_tokens, **candidate)
        best, tried = fastest(f"generate, batch {batch}", candidates, measure)
        speeds = {precision: hadal(args, batch, precision, 2 * batch)["generated_tokens_per_sec"] for precision in ("f32", "bf16")}
        precision = max(speeds, key=speeds.get)
        rounds = []
        for number in range(args.rounds):
            theirs = measure(**candidates[best])
            ours = hadal(args, batch, precision, 4 * batch)["generated_tokens_per_sec"]
            rounds.append({"torch_tokens_per_sec": theirs, "hadal_tokens_per_sec": ours})
            print(f"  batch {batch}, round {number + 1}: torch {theirs:,.1f}, hadal {ours:,.1f} tokens/s", file=sys.stderr)
        ratio = statistics.median(r["hadal_tokens_per_sec"] / r["torch_tokens_per_sec"] for r in rounds)
        result["batches"].append(
            {
                "batch": batch,
                "torch_fastest": best,
                "torch_tried_tokens_per_sec": tried,
                "hadal_precision": precision,
                "hadal_tried_tokens_per_sec": speeds,
                "rounds": rounds,
                "ratio": ratio,
            }
        )
    one, many = (hadal(args, concurrency, precision, 2 * concurrency) for concurrency in (1, 32))
    result["hadal_1"], result["hadal_32"] = one, many
    print(f"{'batch':>5}  {'torch tok/s':>12}  {'hadal tok/s':>12}  {'hadal/torch':>11}  torch's fastest; hadal's")
    for row in result["batches"]:
        theirs, ours = (statistics.median(r[f"{who}_tokens_per_sec"] for r in row["rounds"]) for who in ("torch", "hadal"))
        print(f"{row['batch']:>5}  {theirs:>12,.1f}  {ours:>12,.1f}  {row['ratio']:>11.2f}  {row['torch_fastest']}; {row['hadal_precision']}")
    alone, together = one["generated_tokens_per_sec"], many["generated_tokens_per_sec"]
    print(f"hadal, 32 at a time against 1: {together:,.1f} against {alone:,.1f} tokens/s, {together / alone:.2f} times")
    per_token, plain = one["cache_bytes_per_token"], one["mha_cache_bytes_per_token"]
    print(f"cache: {per_token:,} bytes a token; plain multi-head attention {plain:,}, {plain / per_token:.1f} times as much")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
