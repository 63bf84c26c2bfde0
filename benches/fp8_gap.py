"""FP8 against bf16: trains a scene in each format under several seeds, and says how far apart the losses end.

    python benches/fp8_gap.py --hadal target/release/hadal --scene scenes/quickstart.ron --seeds 1 2 3 --out gap

Writes gap.csv (training loss of each step and run) and gap.svg (its curves, a mean over ten steps), and prints the last validation losses.
Needs nothing but Python. Runs that --out's folder of runs has already are not repeated.
"""

import argparse
import json
import pathlib
import subprocess

COLOURS = {"F32": "#777777", "Bf16": "#2266bb", "Fp8": "#cc5522"}


def train(hadal, scene, runs, compute, seed):
    folder = runs / f"{compute}-{seed}"
    result = runs / f"{compute}-{seed}.json"
    if not result.exists():
        sets = [f"precision.compute={compute}", f"seed={seed}", f'telemetry.dir="{folder}"']
        command = [hadal, "run", scene, *(part for value in sets for part in ("--set", value)), "--json", result]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    report = json.loads(result.read_text())
    log = next(folder.glob("*/log.jsonl"))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return report, [line["loss_nats_per_token"] for line in lines if "loss_nats_per_token" in line]


def smooth(losses, width=10):
    return [sum(part) / len(part) for i in range(len(losses)) if (part := losses[max(0, i - width + 1) : i + 1])]


def svg(curves):
    width, height, left, top = 720, 420, 60, 20
    everything = [loss for _, losses in curves for loss in losses[10:]]
    low, high, steps = min(everything), max(everything), max(len(losses) for _, losses in curves)
    at = lambda i, loss: (left + i / steps * (width - left - 20), top + (high - loss) / (high - low) * (height - top - 50))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for tick in range(int(low * 2) + 1, int(high * 2) + 1):
        x, y = at(0, tick / 2)
        parts.append(f'<path d="M{x} {y:.1f}H{width - 20}" stroke="#ddd"/><text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{tick / 2}</text>')
    for step in range(0, steps + 1, 50):
        x, y = at(step, low)
        parts.append(f'<text x="{x:.1f}" y="{y + 20:.1f}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">step; training loss in nats per token, mean of 10 steps</text>')
    for (compute, _), losses in curves:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(i, loss) for i, loss in enumerate(losses) if i >= 10))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[compute]}"/>')
    for i, compute in enumerate(dict.fromkeys(compute for (compute, _), _ in curves)):
        parts.append(f'<text x="{width - 90}" y="{40 + 18 * i}" fill="{COLOURS[compute]}">{compute}</text>')
    return "\n".join(parts + ["</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hadal", default="target/release/hadal")
    parser.add_argument("--scene", default="scenes/quickstart.ron")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--formats", nargs="+", default=["Bf16", "Fp8"], choices=list(COLOURS), help="the first is what the others are compared with")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gap"))
    args = parser.parse_args()
    runs = args.out.with_name(args.out.name + "-runs")
    runs.mkdir(parents=True, exist_ok=True)
    results = {(compute, seed): train(args.hadal, args.scene, runs, compute, seed) for seed in args.seeds for compute in args.formats}
    base = args.formats[0]
    mean = lambda compute: sum(results[compute, seed][0]["val_loss_nats_per_token"] for seed in args.seeds) / len(args.seeds)
    for compute in args.formats:
        for seed in args.seeds:
            loss, reference = (results[of, seed][0]["val_loss_nats_per_token"] for of in (compute, base))
            print(f"{compute:5} seed {seed}: validation loss {loss:.4f} nats per token, {100 * (loss / reference - 1):+.2f}% of {base}'s")
        print(f"{compute:5} mean:   validation loss {mean(compute):.4f} nats per token, {100 * (mean(compute) / mean(base) - 1):+.2f}% of {base}'s")
    keys = sorted(results)
    rows = zip(*(results[key][1] for key in keys), strict=True)
    lines = ["step," + ",".join(f"{compute}-{seed}" for compute, seed in keys)]
    lines += [f"{step}," + ",".join(f"{loss:.4f}" for loss in row) for step, row in enumerate(rows, 1)]
    args.out.with_suffix(".csv").write_text("\n".join(lines) + "\n")
    args.out.with_suffix(".svg").write_text(svg([(key, smooth(results[key][1])) for key in keys]))


if __name__ == "__main__":
    main()
