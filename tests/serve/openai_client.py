"""OpenAI's own Python client and curl against a running server: chat, streaming, log-probabilities, stop texts, several answers,
tools, embeddings, models, errors.

    python tests/serve/openai_client.py URL [--key KEY] [--busy-url URL]

URL is that of `hadal serve`, or of the example `fake_server`, whose answers are known to the letter: with `--echo` those are checked
too. `--busy-url` is a server with a short queue, where a full one can be met.
"""

import argparse
import concurrent.futures
import json
import math
import subprocess
import sys

import openai

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def raises(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, found an answer")


def user(text):
    return [{"role": "user", "content": text}]


class Site:
    def __init__(self, arguments):
        self.arguments = arguments
        self.client = openai.OpenAI(base_url=f"{arguments.url}/v1", api_key=arguments.key or "none", max_retries=0, timeout=120)
        self.model = self.client.models.list().data[0].id
        self.is_echo = arguments.echo

    def chat(self, text="Call me Ishmael, said the whale.", **more):
        more.setdefault("max_tokens", 24)
        return self.client.chat.completions.create(model=self.model, messages=user(text), **more)

    def complete(self, prompt="Call me Ishmael, said the whale.", **more):
        return self.client.completions.create(model=self.model, prompt=prompt, **more)


@check
def schemas(site):
    if site.is_echo:
        return
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["calm", "stormy"]}, "waves": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["mood", "waves"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "sea", "strict": True, "schema": schema}}
    # White space is JSON, too: a model that knows nothing would write little else.
    answer = site.chat("How is the sea?", response_format=form, max_tokens=400, frequency_penalty=2, seed=1).choices[0]
    found = json.loads(answer.message.content)
    assert answer.finish_reason == "stop" and found["mood"] in ("calm", "stormy") and 0 <= found["waves"] <= 9, answer
    bad = {"type": "json_schema", "json_schema": {"name": "bad", "schema": {"type": "no such type"}}}
    error = raises(openai.BadRequestError, lambda: site.chat(response_format=bad))
    assert error.param == "response_format", error


@check
def models(site):
    model = site.client.models.retrieve(site.model)
    assert (model.id, model.object) == (site.model, "model"), model
    error = raises(openai.NotFoundError, lambda: site.client.models.retrieve("no-such-model"))
    assert error.code == "model_not_found", error


@check
def chat(site):
    reply = site.chat(temperature=0)
    choice = reply.choices[0]
    assert reply.object == "chat.completion" and choice.message.role == "assistant", reply
    assert choice.finish_reason in ("stop", "length"), choice
    usage = reply.usage
    assert 1 <= usage.completion_tokens <= 24 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage
    assert 0 <= usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens, usage
    if site.is_echo:
        assert choice.message.content == " Call me Ishmael, said the whale.", choice
    # The same again is the same, and a seed too.
    assert site.chat(temperature=0).choices[0].message.content == choice.message.content
    first, second = (site.chat(temperature=1.5, seed=11).choices[0].message.content for _ in range(2))
    assert first == second, (first, second)


@check
def streaming(site):
    whole = site.chat(temperature=0)
    pieces = list(site.chat(temperature=0, stream=True, stream_options={"include_usage": True}))
    assert pieces[0].choices[0].delta.role == "assistant", pieces[0]
    last = pieces[-1]
    counts = lambda usage: (usage.prompt_tokens, usage.completion_tokens)
    assert last.choices == [] and counts(last.usage) == counts(whole.usage), (last, whole.usage)
    choices = [piece.choices[0] for piece in pieces if piece.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert choices[-1].finish_reason == whole.choices[0].finish_reason
    assert all(choice.finish_reason is None for choice in choices[:-1])
    assert len(choices) > 3, choices
    text = "".join(piece.choices[0].text for piece in site.complete(temperature=0, max_tokens=12, stream=True))
    assert text == site.complete(temperature=0, max_tokens=12).choices[0].text


@check
def leaving_early(site):
    with site.chat("Tell me all of it. " * 8, stream=True, max_tokens=200) as stream:
        for _, _ in zip(range(3), stream):
            pass
    assert site.chat(max_tokens=2).usage.completion_tokens >= 1


@check
def log_probabilities(site):
    content = site.chat(temperature=0, logprobs=True, top_logprobs=3, max_tokens=6).choices[0].logprobs.content
    assert 1 <= len(content) <= 6, content
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.logprob <= 0, entry
        ranked = [other.logprob for other in entry.top_logprobs]
        assert ranked == sorted(ranked, reverse=True), ranked
        assert sum(math.exp(logprob) for logprob in ranked) <= 1.0 + 1e-4 or site.is_echo, ranked
        if not site.is_echo:
            assert entry.logprob == ranked[0], (entry, "the likeliest token was asked for")
    found = site.complete(temperature=0, logprobs=2, max_tokens=6).choices[0]
    lists = found.logprobs
    counts = {len(part) for part in (lists.tokens, lists.token_logprobs, lists.top_logprobs, lists.text_offset)}
    assert len(counts) == 1 and lists.text_offset[0] == 0, lists
    assert all(token in top for token, top in zip(lists.tokens, lists.top_logprobs)), lists


@check
def stop_texts(site):
    whole = site.complete(temperature=0, max_tokens=24).choices[0].text
    inner = whole[len(whole) // 2 : len(whole) // 2 + 3]
    cut = site.complete(temperature=0, max_tokens=24, stop=[inner, "\x00never"]).choices[0]
    assert cut.text == whole[: whole.index(inner)] and cut.finish_reason == "stop", (whole, inner, cut)
    text = "".join(piece.choices[0].text for piece in site.complete(temperature=0, max_tokens=24, stop=inner, stream=True))
    assert text == cut.text, (text, cut.text)


@check
def several_answers(site):
    reply = site.complete(["Call me", "The whale"], n=2, max_tokens=5, seed=3, temperature=1.0)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3], reply
    again = site.complete(["Call me", "The whale"], n=2, max_tokens=5, seed=3, temperature=1.0)
    assert [choice.text for choice in reply.choices] == [choice.text for choice in again.choices]
    alone = site.complete("Call me", max_tokens=5, seed=4, temperature=1.0).choices[0].text
    assert alone == reply.choices[1].text, "the second answer has the next seed"
    seen = {choice.index for piece in site.chat(n=3, stream=True) for choice in piece.choices}
    assert seen == {0, 1, 2}, seen


@check
def tokens_as_prompt(site):
    post = lambda path, body: json.loads(curl(site, path, body)[1])
    ids = post("/tokenize", {"prompt": "Call me Ishmael", "add_special_tokens": False})["tokens"]
    assert post("/detokenize", {"tokens": ids})["prompt"] == "Call me Ishmael", ids
    by_tokens = site.complete(ids, temperature=0, max_tokens=6)
    assert by_tokens.usage.prompt_tokens == len(ids)
    by_text = site.complete("Call me Ishmael", temperature=0, max_tokens=6, extra_body={"add_special_tokens": False})
    assert by_tokens.choices[0].text == by_text.choices[0].text


@check
def tools_through_the_template(site):
    function = {"name": "weather", "description": "Of a town", "parameters": {"type": "object", "properties": {}}}
    reply = site.chat("What is it like?", tools=[{"type": "function", "function": function}], max_tokens=8)
    assert reply.choices[0].finish_reason in ("stop", "length", "tool_calls"), reply
    error = raises(openai.BadRequestError, lambda: site.chat(tools=[{"type": "function"}]))
    assert error.param == "tools", error
    if site.is_echo:
        call = '<tool_call>{"name": "weather", "arguments": {"town": "Nantucket"}}</tool_call>'
        reply = site.chat(call, tools=[{"type": "function", "function": function}], max_tokens=100)
        found = reply.choices[0].message.tool_calls[0].function
        assert (found.name, json.loads(found.arguments)) == ("weather", {"town": "Nantucket"}), reply
        history = user("x") + [reply.choices[0].message.model_dump(), {"role": "tool", "content": "wet", "tool_call_id": "x"}]
        site.client.chat.completions.create(model=site.model, messages=history, max_tokens=4)


@check
def embeddings(site):
    one, two = site.client.embeddings.create(model=site.model, input=["a whale", "a ship"]).data
    assert len(one.embedding) == len(two.embedding) > 0 and one.embedding != two.embedding
    # The client asks for base64 by itself; numbers are the same.
    plain = site.client.embeddings.create(model=site.model, input="a whale", encoding_format="float").data[0].embedding
    assert all(abs(a - b) <= 1e-5 * (1 + abs(b)) for a, b in zip(one.embedding, plain))


@check
def errors(site):
    bad = [
        ("temperature", {"temperature": 3}),
        ("max_tokens", {"max_tokens": -1}),
        ("top_p", {"top_p": 1.5}),
        ("stop", {"stop": ["a"] * 5}),
        ("logit_bias", {"logit_bias": {"x": 1}}),
        ("n", {"n": 0}),
        ("presence_penalty", {"presence_penalty": -3}),
        ("top_logprobs", {"top_logprobs": 2}),
    ]
    for param, more in bad:
        error = raises(openai.BadRequestError, lambda: site.chat(**more))
        assert error.param == param and error.type == "invalid_request_error", (param, error)
    error = raises(openai.BadRequestError, lambda: site.client.chat.completions.create(model=site.model, messages=[]))
    assert error.param == "messages", error
    raises(openai.NotFoundError, lambda: site.client.chat.completions.create(model="other", messages=user("x")))
    limit = json.loads(curl(site, "/v1/models")[1])["data"][0]["max_model_len"]
    error = raises(openai.BadRequestError, lambda: site.complete("whale " * (4 * limit)))
    assert error.code == "context_length_exceeded", error


@check
def keys(site):
    if not site.arguments.key:
        return
    for key in ("wrong", site.arguments.key + "x"):
        client = openai.OpenAI(base_url=f"{site.arguments.url}/v1", api_key=key, max_retries=0)
        error = raises(openai.AuthenticationError, lambda: client.models.list())
        assert error.code == "invalid_api_key", error
    for path, status in [("/health", 200), ("/metrics", 401), ("/v1/models", 401), ("/", 401), ("/v1/routing", 401)]:
        assert curl(site, path, key=None)[0] == status, path


@check
def a_full_queue(site):
    url = site.arguments.busy_url
    if not url:
        return
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    ask = lambda _: client.chat.completions.create(model=site.model, messages=user("one two three " * 8), max_tokens=100)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        ends = [future.exception() for future in [pool.submit(ask, i) for i in range(16)]]
    refused = [error for error in ends if error is not None]
    assert refused and all(isinstance(error, openai.RateLimitError) for error in refused), ends
    assert any(error is None for error in ends), ends
    assert all(error.code == "queue_full" and int(error.response.headers["retry-after"]) >= 1 for error in refused)
    # The client comes again when it is told to.
    patient = client.with_options(max_retries=20)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: patient.chat.completions.create(model=site.model, messages=user("hi"), max_tokens=4), range(8)))


@check
def plain_curl(site):
    status, text = curl(site, "/v1/chat/completions", {"messages": user("hi"), "max_tokens": 4, "stream": True})
    lines = [line for line in text.splitlines() if line]
    assert status == 200 and all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]", text
    status, text = curl(site, "/metrics")
    assert status == 200 and ":num_requests_running{model_name=" in text and ":time_to_first_token_seconds_bucket{" in text, text
    status, text = curl(site, "/v1/routing")
    routing = json.loads(text)
    assert status == 200 and all(sum(layer["total"]) > 0 for layer in routing["layers"]), text
    status, text = curl(site, "/v1/nowhere")
    assert status == 404 and json.loads(text)["error"]["code"] == "not_found", text
    status, text = curl(site, "/v1/completions", "{")
    assert status == 400 and json.loads(text)["error"]["code"] == "invalid_json", text
    assert curl(site, "/health")[0] == 200


def curl(site, path, body=None, key=""):
    command = ["curl", "-sS", "--max-time", "120", "-w", "\n%{http_code}", site.arguments.url + path]
    key = site.arguments.key if key == "" else key
    if key:
        command += ["-H", f"Authorization: Bearer {key}"]
    if body is not None:
        text = body if isinstance(body, str) else json.dumps(body)
        command += ["-H", "Content-Type: application/json", "--data-binary", "@-"]
    else:
        text = None
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    text, status = done.stdout.rsplit("\n", 1)
    return int(status), text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--key")
    parser.add_argument("--busy-url")
    parser.add_argument("--echo", action="store_true", help="the server is the example `fake_server`")
    arguments = parser.parse_args()
    site = Site(arguments)
    num_failed = 0
    for function in CHECKS:
        try:
            function(site)
            print(f"ok      {function.__name__}")
        except Exception as error:  # noqa: BLE001: each check is told of
            num_failed += 1
            print(f"FAILED  {function.__name__}: {type(error).__name__}: {str(error)[:2000]}")
    print(f"{len(CHECKS) - num_failed} passed, {num_failed} failed")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
