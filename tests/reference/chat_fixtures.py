"""Writes crates/text/tests/fixtures/chat.json: what transformers renders from chat templates.

    python tests/reference/chat_fixtures.py SmolLM2-135M-Instruct.Q4_1.gguf

Needs transformers, jinja2 and gguf. SmolLM2's template is the file's; a case without `template` means that one. The
others are written here, in the manner of well-known families, to use every construct that those use.
"""
import datetime
import itertools
import json
import sys
from pathlib import Path

import gguf
from jinja2.exceptions import TemplateError
from transformers.utils import chat_template_utils

OUT = Path(__file__).parents[2] / "crates/text/tests/fixtures/chat.json"


class Today(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2025, 11, 26)


chat_template_utils.datetime = Today

TEMPLATES = {
    "llama 2": """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set intro = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' %}{% else %}{% set rest = messages %}{% set intro = false %}{% endif %}
{%- for turn in rest %}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate: user, assistant, user, ...') }}
    {%- endif %}
    {%- if loop.first and intro is not false %}{% set text = intro + turn['content'] %}{% else %}{% set text = turn['content'] %}{% endif %}
    {%- if turn.role == 'user' %}{{ bos_token + '[INST] ' + text | trim + ' [/INST]' }}{% elif turn.role == 'assistant' %}{{ ' ' + text | trim + ' ' + eos_token }}{% endif %}
{%- endfor %}
""",
    "llama 3": """{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% else %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- endif %}
{#- The system's words go into the first turn. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{ message.content | tojson }}{% else %}{{ message.content }}{% endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "thinking": """{%- set ns = namespace(last=-1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.seen and message.role == "user" and message.content is string and not(message.content.startswith('<r>') and message.content.endswith('</r>')) %}
        {%- set ns.seen = true %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content if message.content is string else '' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- generation %}
        {%- if loop.index0 > ns.last and thought %}{{ '<a><think>' + thought.strip('\\n') + '</think>' + content }}{% else %}{{ '<a>' + content }}{% endif %}
        {%- endgeneration %}
        {%- if message.tool_calls %}
            {%- for call in message.tool_calls %}
                {%- if (loop.first and content) or not loop.first %}{{ '\\n' }}{% endif %}
                {%- if call.function %}{% set call = call.function %}{% endif %}
                {{- '<call>{"name": "' ~ call.name ~ '", "arguments": ' }}
                {%- if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}
                {{- '}</call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '</a>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{ '<t>' }}{% endif %}
        {{- message.content }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{ '</t>\\n' }}{% endif %}
    {%- else %}
        {{- '<' + message.role[0] + '>' + (message.content if message.content is string else 'parts') + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<a>' }}{% if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}{% endif %}
""",
    "python": """{% macro fields(d, skip=['type']) -%}
{% for key, value in d.items() if key not in skip %}{{ loop.index }}/{{ loop.length }} {{ key }}={{ value }}{{ ', ' if not loop.last }}{% endfor %}
{%- endmacro %}
{% for m in messages %}
{% if m.role == 'system' %}{% continue %}{% endif %}
{% if loop.index > 4 %}{% break %}{% endif %}
{{ loop.cycle('odd', 'even') }} {{ m.role.upper() }}: {{ m['content'] | default('nothing', true) | replace('a', 'A') }} {{ loop.previtem.role if loop.previtem is defined else '-' }}
{% endfor %}
{{ tools }} {{ [1, 'it\\'s', None, True, 1.0, {'k': []}, 'é\\n'] }} {{ {'a': 'b"c'} }} {{ none }} {{ true }} {{ 1e20 }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 2 ** 3 }} {{ 'ab' * 2 }}
{% if tools %}{% for tool in tools %}{{ fields(tool.function.parameters.properties) }}
{{ tool.function.parameters.required ~ '!' }} {{ tool.function.parameters.required | join(', ') }} {{ tool.function | tojson(sort_keys=true) }}
{% endfor %}{% endif %}
{% set text %}block {{ messages | length }}{% endset %}{{ text | upper | trim }} {{ text.title() }} {{ text.find('k') }} {{ text[:3] }} {{ text[-1] }} {{ text is sequence }} {{ none is iterable }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='role') | list }} {{ messages | rejectattr('role', 'eq', 'user') | list | length }} {{ range(3) | list }} {{ (messages | first).role }}{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}
{%+ if true %} kept {%+ endif %}
  {% raw %}{{ raw }}{% endraw %} {{ "%s and %d" | format('x', 3) }} {{ 'x' if false }}|{{ undefined_name }}|{{ messages[0].nothing is defined }} {{ dict(a=1)['a'] }} {{ 'a,b'.split(',') | last }} {{ "q\\"'" }} {{ '<&>' | escape }}
""",
    "parts": """{% for message in messages %}{{ message.role }}:{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'text' %}[{{ part.text }}]{% elif part.type == 'image' or 'image' in part %}<image>{% endif %}{% endfor %}{% endif %};{% endfor %}{% if add_generation_prompt %}A:{% endif %}""",
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Get <the> \"weather\" & more: é", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "enum": ["Köln", "Rome"]}, "days": {"type": "integer", "default": 1.5}}, "required": ["city"]}}}]
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": [1, 2.0, None, True]}}}
CHATS = {
    "one": [{"role": "user", "content": "Hi <b> & \"you\""}],
    "system": [{"role": "system", "content": "  Be brief. \n"}, {"role": "user", "content": " Hello\n"}, {"role": "assistant", "content": " Hey "}, {"role": "user", "content": "é😀 a banana?"}],
    "twice": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "call": [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "call00001", "content": "{\"rain\": 0.5}"}],
    "think": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nans"}, {"role": "user", "content": "r"}, {"role": "assistant", "content": "a2", "reasoning_content": "r2"}],
}


def case(name, source, chat, tools, prompt, kwargs):
    arguments = {"bos_token": "<s>", "eos_token": "</s>", **kwargs}
    ending = {"generation": {"add_generation_prompt": True}, "last": {}, "open": {"continue_final_message": True}}[prompt]
    out = {"template": name, "messages": chat, "tools": tools, "ending": prompt, "kwargs": kwargs}
    try:
        rendered, _ = chat_template_utils.render_jinja_template([chat], chat_template=source, tools=tools, **ending, **arguments)
        return out | {"text": rendered[0]}
    except TemplateError as error:
        return out | {"refused": str(error)}


def main(path):
    smollm2 = gguf.GGUFReader(path).fields["tokenizer.chat_template"].contents()
    cases = []
    for (name, source), (title, chat), prompt in itertools.product(({"smollm2": smollm2} | TEMPLATES).items(), CHATS.items(), ("generation", "last")):
        if title == "call" and name in ("llama 2", "smollm2"):
            continue
        for tools in (None, TOOLS) if name in ("llama 3", "python") else (None,):
            cases.append(case(name, source, chat, tools, prompt, {}))
    one, system = CHATS["one"], CHATS["system"]
    for name, source in ({"smollm2": smollm2} | TEMPLATES).items():
        if name != "python":
            cases.append(case(name, source, [*one, {"role": "assistant", "content": " The answer is "}], None, "open", {}))
    cases.append(case("llama 3", TEMPLATES["llama 3"], system, None, "generation", {"date_string": "1 Jan 2000", "bos_token": "<B>"}))
    cases.append(case("llama 3", TEMPLATES["llama 3"], one, None, "generation", {"custom_tools": TOOLS}))
    cases.append(case("thinking", TEMPLATES["thinking"], one, None, "generation", {"enable_thinking": False}))
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]}]
    for prompt in ("generation", "last", "open"):
        cases.append(case("parts", TEMPLATES["parts"], parts, None, prompt, {}))
    OUT.write_text(json.dumps({"templates": TEMPLATES, "cases": cases}, ensure_ascii=False, indent=None, separators=(",", ":")) + "\n")
    print(len(cases), "cases,", sum("refused" in c for c in cases), "refused,", OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main(sys.argv[1])
