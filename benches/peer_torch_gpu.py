#!/usr/bin/env python3
"""Hadal's kernels against torch on the same GPU, at the same shapes, in one run.

    python benches/peer_torch_gpu.py --hadal ./hadal --rounds 3 --json ratio.json

Needs an NVIDIA GPU, and torch built for CUDA (2.8 or later for the grouped product); Hadal needs nothing but the driver.
`hadal bench kernels --device cuda:0 --json -` prints a document with a row for each op and shape; this script times what torch has
for the same: torch.mm for dense products (all three passes are one to it), torch._grouped_mm or torch.nn.functional.grouped_mm for
experts, copy_, rms_norm, and silu times a product. Between runs 512 MiB are written, as Hadal does, so that nothing is found in a cache. Times are from
CUDA events, the median of --runs. Hadal and torch take turns for --rounds rounds, so that a warm or a slow GPU meets both; the
table shows the median of each, and the median of the rounds' ratios (more than 1: Hadal is faster).

With --scene, the quickstart's training step in transformers on the GPU is timed as well, beside `hadal bench train`.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time

import torch

FLUSH_BYTES = 512 << 20


def timed(run, runs, flush):
    """Median seconds of `run` on the device."""
    for _ in range(2):
        run()
    secs = []
    for _ in range(runs):
        if flush is not None:
            flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        secs.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(secs)


def random(dtype, *dims):
    return torch.empty(*dims, dtype=dtype, device="cuda").uniform_(-1, 1)


def grouped_mm(a, b, offsets):
    """torch's grouped product, under the name that this version has it."""
    function = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if function is None:
        return None
    return lambda: function(a, b, offs=offsets)


def peer(row):
    """What torch has for a row of Hadal's, or None."""
    dtype = {"Bf16": torch.bfloat16, "F32": torch.float32}[row["dtype"]]
    numbers = [int(n) for n in re.findall(r"\d+", row["shape"].split(" into ")[0])]
    op = row["op"]
    if op == "elementwise::copy":
        x, y = random(dtype, numbers[0]), random(dtype, numbers[0])
        return lambda: y.copy_(x)
    if op in ("gemm::forward", "gemv::forward"):
        m, k, n, _ = numbers
        x, w, y = random(dtype, m, k), random(dtype, n, k), random(dtype, m, n)
        return lambda: torch.mm(x, w.t(), out=y)
    if op == "gemm::input_grad":
        m, n, _, k = numbers
        dy, w, dx = random(dtype, m, n), random(dtype, n, k), random(dtype, m, k)
        return lambda: torch.mm(dy, w, out=dx)
    if op == "gemm::weight_grad":
        # Hadal adds to f32; torch has no such product, and assigns bf16.
        m, n, _, k = numbers
        dy, x, dw = random(dtype, m, n), random(dtype, m, k), random(dtype, n, k)
        return lambda: torch.mm(dy.t(), x, out=dw)
    if op.startswith("grouped_gemm::"):
        e, rows, i, o, _ = numbers
        sizes = [rows * (7 + j * 5 % 7) // 10 for j in range(e)]
        offsets = torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)
        total = sum(sizes)
        w = random(dtype, e, o, i)
        if op.endswith("::forward"):
            return grouped_mm(random(dtype, total, i), w.transpose(1, 2), offsets)
        if op.endswith("::input_grad"):
            return grouped_mm(random(dtype, total, o), w, offsets)
        return grouped_mm(random(dtype, total, o).t(), random(dtype, total, i), offsets)
    if op == "rms_norm::forward":
        t, d = numbers
        x, w = random(dtype, t, d), random(dtype, d)
        return lambda: torch.nn.functional.rms_norm(x, (d,), w, 1e-6)
    if op == "swiglu::forward":
        t, f = numbers
        h = random(dtype, t, 2 * f)
        return lambda: torch.nn.functional.silu(h[:, :f]) * h[:, f:]
    return None


def torch_round(rows, runs):
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    secs = {}
    for row in rows:
        key = (row["op"], row["dtype"], row["shape"])
        try:
            run = peer(row)
            if run is not None:
                secs[key] = timed(run, runs, flush)
        except RuntimeError as error:
            print(f"torch has no {key}: {str(error).splitlines()[0]}", file=sys.stderr)
        torch.cuda.empty_cache()
    return secs


def hadal_json(hadal, *args):
    done = subprocess.run([hadal, *args, "--json", "-"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def training_step(document, steps):
    """Seconds of a training step of the same model and batch in transformers, in bf16 under autocast."""
    import transformers

    config = dict(document["config"])
    for key in ("num_nextn_predict_layers", "num_mtp_layers", "quantization_config"):
        config.pop(key, None)
    config["num_nextn_predict_layers"] = 0
    config = transformers.AutoConfig.for_model(**config)
    best = None
    for experts in ["grouped_mm", "eager"]:
        try:
            model = transformers.AutoModelForCausalLM.from_config(config).cuda().train()
            model.set_experts_implementation(experts)
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            rows = document["tokens_per_step"] // document["seq_len"]
            tokens = torch.randint(0, config.vocab_size, (rows, document["seq_len"]), device="cuda")
            secs = []
            for i in range(steps + 2):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                torch.cuda.synchronize()
                if i >= 2:
                    secs.append(time.perf_counter() - begin)
            found = statistics.median(secs)
            best = found if best is None else min(best, found)
        except (RuntimeError, ValueError, TypeError) as error:
            print(f"transformers with {experts}: {error}", file=sys.stderr)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hadal", default="target/release/hadal", help="the program")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scene", help="also time training steps of this scene")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device")

    rounds = []
    for _ in range(args.rounds):
        document = hadal_json(args.hadal, "bench", "kernels", "--device", "cuda:0", "--runs", str(args.runs))
        mine = {(row["op"], row["dtype"], row["shape"]): row["secs"] for row in document["rows"]}
        rounds.append((mine, torch_round(document["rows"], args.runs)))

    report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "hadal": document["version"], "rows": []}
    print(f"{report['gpu']}, torch {report['torch']}, Hadal {report['hadal']}, {args.rounds} rounds of {args.runs} runs")
    print(f"{'op':26} {'type':5} {'shape':36} {'Hadal us':>10} {'torch us':>10} {'ratio':>6}")
    for key in rounds[0][0]:
        if not all(key in theirs for _, theirs in rounds):
            continue
        mine = statistics.median(m[key] for m, _ in rounds)
        theirs = statistics.median(t[key] for _, t in rounds)
        ratio = statistics.median(t[key] / m[key] for m, t in rounds)
        op, dtype, shape = key
        print(f"{op:26} {dtype:5} {shape:36} {1e6 * mine:10.1f} {1e6 * theirs:10.1f} {ratio:6.2f}")
        report["rows"].append(
            {"op": op, "dtype": dtype, "shape": shape, "hadal_secs": mine, "torch_secs": theirs, "ratio": ratio}
        )
    for name, op, start in [("dense at M = 4096", "gemm::forward", "[4096,"), ("grouped", "grouped_gemm::forward", "")]:
        bf16 = [row for row in report["rows"] if row["op"] == op and row["dtype"] == "Bf16"]
        ratios = [row["ratio"] for row in bf16 if row["shape"].startswith(start)]
        if ratios:
            report[name] = statistics.median(ratios)
            print(f"median ratio, {name}: {report[name]:.2f}")
    if args.scene:
        sets = ["--set", "device=Cuda(0)", "--set", "precision.compute=Bf16"]
        document = hadal_json(args.hadal, "bench", "train", "--scene", args.scene, "--no-mtp", *sets)
        theirs = training_step(document, 10)
        report["train"] = {"hadal_secs": document["step_secs"], "transformers_secs": theirs}
        print(f"training step: Hadal {document['step_secs']:.4f} s, transformers {theirs} s")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
