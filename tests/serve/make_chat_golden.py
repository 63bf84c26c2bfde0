"""Chats rendered by Jinja2, in the environment that Hugging Face transformers renders chat templates in: what Hadal's rendering is
tested against. Run with jinja2 from PyPI; writes tests/serve/chat_golden.json.

    python tests/serve/make_chat_golden.py
"""

import json
import pathlib

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

USER = {"role": "user", "content": "  Hi <there> & 'you' é\n"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "<think>hm</think>\n\nHello."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5, None, True]}}}],
}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "x"}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "Adds <a> & b, é.", "parameters": {"type": "object", "properties": {}}},
    }
]

# Written for this test, each with the constructs that a family of published templates leans on.
TEMPLATES = {
    "turns between marks": """
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set first = 'You help.' %}
    {%- set rest = messages %}
{%- endif %}
{{- '<|im_start|>system\\n' + first }}
{%- if tools %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>" }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in rest %}
    {%- if message.role == "tool" %}
        {%- if loop.first or rest[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or rest[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content | trim }}
        {%- for call in message.tool_calls or [] %}
            {%- set f = call.function if call.function is defined else call %}
            {{- '\\n<tool_call>\\n{"name": "' ~ f.name ~ '", "arguments": ' ~ f.arguments | tojson ~ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "a namespace and thoughts cut off": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system='', is_first=true, n=0) -%}
{%- for message in messages if message['role'] == 'system' %}
    {%- set ns.system = ns.system + message['content'] -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message.role == 'user' -%}
        {%- set ns.n = ns.n + 1 -%}
        {{ '<|User|>' + message['content'].strip() }}
    {%- elif message.role == 'assistant' and not message.tool_calls -%}
        {%- set content = message['content'] -%}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif -%}
        {{ '<|Assistant|>' + content + eos_token }}
    {%- endif -%}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}[{{ ns.n }}]""",
    "white space around blocks": """{% for message in messages %}
  {% if loop.index0 > 0 %}
---
  {% endif %}
    {{ message.role | upper }}:
        {{ message.content }}
{% endfor %}
{# a remark #}
  end
""",
    "python's texts and filters": """{% macro turn(m, mark='>') %}{{ mark }}{{ m.role.title() }}{% endmacro %}
{{ messages | map(attribute='role') | join(',') }}|{{ messages | length }}|{{ none }}|{{ true }}|{{ 1.0 }}|{{ 7 // 2 }}|{{ -7 % 3 }}
{{ (messages | last).content.endswith('x') }} {{ messages[-1].role.startswith(('to', 'us')) }} {{ 'a-b-c'.split('-', 1) | tojson }}
{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ turn(m) }}{% endfor %}
{% for key, value in {'b': 1, 'a': 2}.items() %}{{ key }}={{ value }};{% endfor %}
{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}{% if loop.index > 3 %}{% break %}{% endif %}{{ m.role[0] }}{% endfor %}
{{ nothing | default('unset') }}|{{ messages[0].nothing }}|{{ 'x' if nothing is defined }}|{{ 'role' in messages[0] }}
{{ tools | tojson(indent=2) if tools else 'no tools' }}{% set parts = [] %}{{ 'a%sb' | format(1) }}
{{ "quotes \\" and \\\\ " | tojson }}{{ [1, 2, 3][::-1] }}{{ {'k': 'v', 'n': none} }}{{ "it's" | replace("'", '"') }}""",
}

CHATS = [
    [USER],
    [SYSTEM, USER],
    [SYSTEM, USER, ANSWER, USER],
    [USER, CALL, RESULT, RESULT, USER],
]


def environment():
    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    return env


def main():
    env = environment()
    cases = []
    for name, text in TEMPLATES.items():
        template = env.from_string(text)
        for messages in CHATS:
            for tools in (None, TOOLS):
                for is_open in (False, True):
                    expected = template.render(
                        messages=messages,
                        tools=tools,
                        add_generation_prompt=is_open,
                        bos_token="<s>",
                        eos_token="</s>",
                    )
                    cases.append(
                        {"name": name, "messages": messages, "tools": tools, "is_open": is_open, "expected": expected}
                    )
    path = pathlib.Path(__file__).with_name("chat_golden.json")
    document = {"jinja2": jinja2.__version__, "templates": TEMPLATES, "cases": cases}
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    print(f"{len(cases)} cases to {path}")


if __name__ == "__main__":
    main()
