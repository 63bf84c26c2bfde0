#!/usr/bin/env python3
"""Writes what transformers says after a prompt, greedily, 64 tokens of it, beside each fixture: `continuation.safetensors` with `tokens`
[1, 72], the prompt's 8 first.

    venv/bin/python make_continuations.py --fixtures fixtures

Each step is a forward over the whole text, in float32 with the plain implementations, without any cache. Of the prompts that the fixture's own
tokens give, the first is taken whose steps all have a margin between the two best logits, so that rounding cannot decide; it is printed.
"""

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

PROMPT, NEW_TOKENS = 8, 64
MIN_MARGIN = 1e-3


@torch.no_grad()
def continuation(model, prompt):
    """The text, and the smallest margin of a step."""
    text, margin = list(prompt), float("inf")
    for _ in range(NEW_TOKENS):
        best = model(torch.tensor([text]), use_cache=False).logits[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        text.append(int(best.indices[0]))
    return text, margin


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixtures", type=Path, default=Path(__file__).parent / "fixtures")
    fixtures = parser.parse_args().fixtures
    torch.set_num_threads(1)
    for folder in sorted(path for path in fixtures.iterdir() if path.is_dir()):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        if hasattr(model.config, "n_routed_experts"):
            model.set_experts_implementation("eager")
        with safe_open(folder / "tokens.safetensors", "pt") as file:
            tokens = file.get_tensor("input_ids").flatten().tolist()
        for start in range(len(tokens) - PROMPT + 1):
            text, margin = continuation(model, tokens[start : start + PROMPT])
            if margin >= MIN_MARGIN:
                break
        else:
            raise SystemExit(f"{folder.name}: no prompt whose margins are all {MIN_MARGIN}")
        save_file({"tokens": torch.tensor([text])}, folder / "continuation.safetensors")
        print(f"{folder.name}: prompt from token {start}, smallest margin {margin:.4f}")


if __name__ == "__main__":
    main()
