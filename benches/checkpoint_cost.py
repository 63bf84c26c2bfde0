#!/usr/bin/env python3
"""What checkpoints cost a run: the quickstart's model with one every 20 steps, and with none, in turns.

    python benches/checkpoint_cost.py --hadal target/release/hadal --rounds 4 --json cost.json

A round is four runs, without, with, with, without, so that a machine that gets slower or faster favours neither. A run's time is that of
the whole process, so that waiting for the last checkpoint, which has no step beside it, counts; the cost is what runs with checkpoints
take longer, over the time that runs without are in steps. The same of processor time, the cost in work, holds on a busy machine, too.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def processor_secs():
    """Of processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(args, folder, checkpoint):
    """Seconds of the process, of its processors, and in steps; and bytes of the last checkpoint."""
    report = Path(folder) / "report.json"
    sets = [
        f"telemetry=(dir: {json.dumps(str(folder))}, tensorboard: false, trace_steps: None, log_every_steps: 1000000)",
        f"train.steps={args.steps}",
        "schedule=Constant(lr: 1e-3)",
        "batch.ramp=[]",
        "routing.bias_warm_down_steps=0",
        "eval=None",
        "sample=None",
        f"checkpoint={checkpoint}",
        *args.set,
    ]
    command = [args.hadal, "run", args.scene, "--fresh", "--json", str(report)] + [f"--set={text}" for text in sets]
    begin, begin_work = time.perf_counter(), processor_secs()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    secs, work = time.perf_counter() - begin, processor_secs() - begin_work
    if done.returncode != 0:
        sys.exit(f"checkpoint_cost: {' '.join(command)}\n{done.stderr}")
    found = json.loads(report.read_text())
    assert found["num_steps"] == args.steps, found
    saved = found["checkpoint_dir"] and Path(found["checkpoint_dir"]).resolve()
    num_bytes = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file()) if saved else 0
    return secs, work, found["train_secs"], num_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hadal", required=True, help="the hadal binary")
    parser.add_argument("--scene", default="scenes/quickstart.ron", help="the scene (default the quickstart)")
    parser.add_argument("--steps", type=int, default=100, help="steps of a run (default 100)")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints (default 20)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of four runs (default 3)")
    parser.add_argument("--set", action="append", default=[], help="as `hadal run --set`")
    parser.add_argument("--json", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    args.hadal = str(Path(args.hadal).resolve())
    saves = f"(every_steps: {args.every})"
    rounds = []
    for number in range(args.rounds):
        secs, works = {"None": [], saves: []}, {"None": [], saves: []}
        steps_secs, num_bytes = [], 0
        load = os.getloadavg()[0]
        for checkpoint in ("None", saves, saves, "None"):
            with tempfile.TemporaryDirectory() as folder:
                whole, work, in_steps, size = run(args, folder, checkpoint)
            secs[checkpoint].append(whole)
            works[checkpoint].append(work)
            num_bytes = max(num_bytes, size)
            if checkpoint == "None":
                steps_secs.append(in_steps)
        none, some = (statistics.mean(secs[key]) for key in ("None", saves))
        cost = (some - none) / statistics.mean(steps_secs)
        work, more = (statistics.mean(works[key]) for key in ("None", saves))
        rounds.append({"without_secs": none, "with_secs": some, "cost": cost, "load": load, "checkpoint_bytes": num_bytes})
        rounds[-1].update({"without_processor_secs": work, "with_processor_secs": more, "processor_cost": more / work - 1})
        print(
            f"round {number + 1}: without {none:.2f} s, with {some:.2f} s, cost {cost:+.2%}; of processors {work:.2f} s, {more:.2f} s, "
            f"{more / work - 1:+.2%}; checkpoints of {num_bytes / 1e6:.1f} MB, load average before {load:.1f}",
            flush=True,
        )
    for key, what in (("cost", "time"), ("processor_cost", "processor time")):
        costs = sorted(one[key] for one in rounds)
        print(f"cost in {what}, median of {len(costs)} rounds: {statistics.median(costs):+.2%} ({costs[0]:+.2%} to {costs[-1]:+.2%})")
    if args.json:
        args.json.write_text(json.dumps({"steps": args.steps, "every_steps": args.every, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
