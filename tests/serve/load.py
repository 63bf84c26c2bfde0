"""Many clients at once against a running server: each streams chats one after the other, and every tenth goes in the middle of its
answer. Afterwards nothing may run or wait, no block of the cache be held, and no client have seen an error that is not its own.

    python tests/serve/load.py URL [--key KEY] [--clients 200] [--secs 60]

A full queue (429) is the server's right: it is counted, and the client comes again after the time it was told.
"""

import argparse
import asyncio
import random
import re
import sys
import time

import openai


class Counts:
    def __init__(self):
        self.whole = self.left = self.refused = self.tokens = 0
        self.errors = []
        self.first_secs = []


async def client(number, site, model, end, counts):
    chance = random.Random(number)
    while time.monotonic() < end:
        leaves = chance.random() < 0.1
        text = " ".join(chance.choice(["whale", "ship", "sea", "captain", "and", "the"]) for _ in range(chance.randint(4, 60)))
        since = time.monotonic()
        try:
            stream = await site.chat.completions.create(
                model=model, messages=[{"role": "user", "content": text}], max_tokens=chance.randint(4, 48), stream=True
            )
            num_pieces, reason = 0, None
            async for piece in stream:
                if num_pieces == 1:
                    counts.first_secs.append(time.monotonic() - since)
                num_pieces += 1
                reason = piece.choices[0].finish_reason or reason
                if leaves and num_pieces == 3:
                    break
            counts.tokens += num_pieces
            if leaves and reason is None:
                await stream.close()
                counts.left += 1
            elif reason is None:
                counts.errors.append("a stream without an end")
            else:
                counts.whole += 1
        except openai.RateLimitError as error:
            counts.refused += 1
            await asyncio.sleep(float(error.response.headers["retry-after"]) * chance.random())
        except Exception as error:  # noqa: BLE001: each is told of
            counts.errors.append(f"{type(error).__name__}: {error}")


def metric(text, name):
    return sum(float(value) for value in re.findall(rf"^\w+:{name}{{[^}}]*}} (\S+)$", text, re.M))


async def run(arguments):
    site = openai.AsyncOpenAI(
        base_url=f"{arguments.url}/v1",
        api_key=arguments.key or "none",
        max_retries=0,
        timeout=120,
    )
    model = (await site.models.list()).data[0].id
    read = lambda: site.with_options(base_url=arguments.url).get("/metrics", cast_to=str)
    before = metric(await read(), "generation_tokens_total")
    counts, begin = Counts(), time.monotonic()
    clients = [client(number, site, model, begin + arguments.secs, counts) for number in range(arguments.clients)]
    await asyncio.gather(*clients)
    secs = time.monotonic() - begin
    for _ in range(100):
        text = await read()
        left = {name: metric(text, name) for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")}
        if not any(left.values()):
            break
        await asyncio.sleep(0.1)
    made = metric(text, "generation_tokens_total") - before
    counts.first_secs.sort()
    at = lambda share: counts.first_secs[int(share * (len(counts.first_secs) - 1))] if counts.first_secs else float("nan")
    print(f"{arguments.clients} clients, {secs:.1f} s: {counts.whole} whole answers, {counts.left} left in the middle, {counts.refused} refused by a full queue")
    print(f"{made / secs:,.0f} tokens/s generated; first piece after {at(0.5):.3f} s in the median, {at(0.99):.3f} s at the 99th percentile")
    print(f"afterwards: {left}")
    for error in counts.errors[:10]:
        print(f"error: {error}")
    good = not counts.errors and not any(left.values()) and counts.whole > 0 and counts.left > 0
    print(f"{int(good)} passed, {int(not good)} failed")
    return 0 if good else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--key")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--secs", type=float, default=60)
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
