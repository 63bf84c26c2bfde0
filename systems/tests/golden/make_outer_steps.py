"""Parameter histories of DiLoCo's outer step, in plain f64 arithmetic with f32 where numbers are kept: `outer_steps.json`.

    python3 systems/tests/golden/make_outer_steps.py

Replicas that stand in for training move by noise; one leaves and comes back. What is written is theta and the momentum after each round,
as the bits of f32. Nothing here is taken from the program that is tested by it.
"""

import json
import pathlib
import struct

BLOCK = 256
LR, MOMENTUM = 0.7, 0.9
PRESENT = [[0, 1, 2], [0, 2], [0, 1, 2], [0, 1]]


def f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def bits(x):
    return struct.unpack("<I", struct.pack("<f", x))[0]


def bf16(x):
    b = bits(x)
    b = (b + 0x7FFF + ((b >> 16) & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", b))[0]


def noise(k):
    """From -0.5 to 0.5, exact in f32."""
    return ((k * 2654435761 % 2**32) >> 8) / 2**24 - 0.5


def nearest_even(x):
    return round(x)  # Python rounds halves to even.


def coded(numbers, coding):
    """What is left of numbers that were sent."""
    if coding == "F32":
        return list(numbers)
    if coding == "Bf16":
        return [bf16(x) for x in numbers]
    out = []
    for at in range(0, len(numbers), BLOCK):
        block = numbers[at : at + BLOCK]
        scale = f32(max(abs(x) for x in block) / 127.0)
        for x in block:
            code = nearest_even(f32(x / scale)) if scale > 0 else 0
            out.append(f32(code * scale))
    return out


def mean(bundles, coding):
    """Each part is added up by one member, and what it found is sent to all."""
    n, length = len(bundles), len(bundles[0])
    out = []
    for i in range(n):
        begin, end = length * i // n, length * (i + 1) // n
        arrived = [coded(bundle[begin:end], coding) for bundle in bundles]
        means = []
        for j in range(end - begin):
            total = 0.0
            for one in arrived:
                total += one[j]
            means.append(f32(total / n))
        out += coded(means, coding)
    return out


def history(number, coding, length):
    theta = [noise(number * 2**20 + i) / 8 for i in range(length)]
    v = [0.0] * length
    rounds = []
    for r, present in enumerate(PRESENT):
        bundles = []
        for replica in present:
            key = (number * 2**20) + (1 + r * 4 + replica) * 2**12
            local = [f32(theta[i] + noise(key + i) / 2 ** (4 + i % 7)) for i in range(length)]
            bundles.append(local if coding == "F32" else [f32(theta[i] - local[i]) for i in range(length)])
        x = mean(bundles, coding)
        for i in range(length):
            at = theta[i]
            if coding == "F32":
                d, after = at - x[i], (1.0 - LR) * at + LR * x[i]
            else:
                d, after = x[i], at - LR * x[i]
            moved = MOMENTUM * v[i] + d
            theta[i] = f32(after - LR * MOMENTUM * moved)
            v[i] = f32(moved)
        rounds.append({"present": present, "theta": [bits(x) for x in theta], "v": [bits(x) for x in v]})
    return {"number": number, "coding": coding, "lr": LR, "momentum": MOMENTUM, "len": length, "rounds": rounds}


cases = [history(1, "F32", 40), history(2, "Bf16", 40), history(3, "Int8", 40), history(4, "Int8", 700)]
path = pathlib.Path(__file__).with_name("outer_steps.json")
path.write_text("[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases) + "\n]\n")
