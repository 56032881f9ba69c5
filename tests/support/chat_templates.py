"""Twelve chat templates in the styles that checkpoints have; written here, none copied."""

CHATML = """\
{%- for turn in messages -%}
<|im_start|>{{ turn['role'] }}
{{ turn['content'] }}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

ZEPHYR = """\
{% for turn in messages %}
{% if turn.role in ['user', 'system', 'assistant'] %}
{{ '<|' + turn.role + '|>\n' + turn.content + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

ALPACA = """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content ~ '\n\n' }}\
{% set rest = messages[1:] %}{% else %}Below is an instruction. Answer it.\n\n\
{% set rest = messages %}{% endif %}
{%- for turn in rest %}
{%- if turn.role == 'user' %}{{ '### Instruction:\n' ~ turn.content.strip() ~ '\n\n' }}
{%- elif turn.role == 'assistant' %}{{ '### Response:\n' ~ turn.content ~ '\n\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"""

VICUNA = """\
{%- set ns = namespace(intro='A chat between a person and a machine. ') -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set ns.intro = messages[0]['content'] | trim ~ ' ' -%}
{%- endif -%}
{{- bos_token ~ ns.intro -}}
{%- for turn in messages if turn['role'] != 'system' -%}
{%- if turn['role'] == 'user' -%}{{ 'USER: ' ~ (turn['content'] | trim) ~ ' ' }}
{%- else -%}{{ 'ASSISTANT: ' ~ (turn['content'] | trim) ~ eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""

MISTRAL_V1 = """\
{{- bos_token }}
{%- for turn in messages %}
{%- if (turn.role == 'user') != (loop.index0 is even) %}
{{- raise_exception('roles have to alternate, from user to assistant') }}
{%- endif %}
{%- if turn.role == 'user' %}{{ ' [INST] ' + turn.content + ' [/INST]' }}
{%- elif turn.role == 'assistant' %}{{ ' ' + turn.content + eos_token }}
{%- else %}{{ raise_exception('only user and assistant') }}{% endif %}
{%- endfor %}"""

MISTRAL_V3 = """\
{%- set start = 1 if messages[0]['role'] == 'system' else 0 %}
{%- set system = messages[0]['content'] if start else none %}
{{- bos_token }}
{%- for turn in messages[start:] %}
{%- if turn['role'] == 'user' %}
{%- if system and loop.last %}{{ '[INST] ' ~ system ~ '\n\n' ~ turn['content'] ~ '[/INST]' }}
{%- else %}{{ '[INST] ' ~ turn['content'] ~ '[/INST]' }}{% endif %}
{%- elif turn['role'] == 'assistant' %}{{ ' ' ~ turn['content'] | trim ~ eos_token }}
{%- endif %}
{%- endfor %}"""

MISTRAL_TOOLS = """\
{%- macro call(one) -%}
{"name": {{ one.function.name | tojson }}, "arguments": {{ one.function.arguments | tojson }}}
{%- endmacro -%}
{{- bos_token }}
{%- for turn in messages %}
{%- if turn.role == 'user' %}
{%- if tools and loop.last %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST] ' + turn.content + '[/INST]' }}
{%- elif turn.tool_calls is defined and turn.tool_calls %}
{{- '[TOOL_CALLS] [' }}{% for one in turn.tool_calls %}{{ call(one) }}
{{- ', ' if not loop.last }}{% endfor %}{{ ']' + eos_token }}
{%- elif turn.role == 'tool' %}
{{- '[TOOL_RESULTS] ' ~ {'content': turn.content} | tojson ~ '[/TOOL_RESULTS]' }}
{%- elif turn.content %}{{ ' ' + turn.content + eos_token }}
{%- endif %}
{%- endfor %}"""

LLAMA_2 = """\
{% if messages[0]['role'] == 'system' %}
{% set turns = messages[1:] %}{% set first = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
{% else %}{% set turns = messages %}{% set first = '' %}{% endif %}
{% for turn in turns %}
{% if loop.first %}{% set text = first + turn['content'] %}
{% else %}{% set text = turn['content'] %}{% endif %}
{% if turn['role'] == 'user' %}{{ bos_token + '[INST] ' + text | trim + ' [/INST]' }}
{% elif turn['role'] == 'assistant' %}{{ ' ' + text | trim + ' ' + eos_token }}{% endif %}
{% endfor %}"""

LLAMA_3 = """\
{{- bos_token -}}
{%- if date is not defined %}{% set date = strftime_now('%Y') %}{% endif -%}
{%- for turn in messages -%}
<|start_header_id|>{{ turn.role }}<|end_header_id|>\n\n
{%- if loop.first and turn.role == 'system' %}\nYear: {{ date }}\n{% endif -%}
{% if turn.content is string %}{{ turn.content | trim }}{% else %}
{%- for part in turn.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<|{{ part.type }}|>
{%- endif %}{% endfor %}{% endif %}<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"""

MERGED = """\
{%- set ns = namespace(system='', seen=false) %}
{%- for turn in messages %}
{%- if turn.role == 'system' %}{% set ns.system = ns.system ~ turn.content ~ '\n' %}{% continue %}{% endif %}
{%- if turn.role == 'user' %}
{{- '<start>user\n' ~ (ns.system if not ns.seen else '') ~ turn.content ~ '<end>\n' }}
{%- set ns.seen = true %}
{%- else %}{% generation %}{{ '<start>model\n' ~ turn.content ~ '<end>\n' }}{% endgeneration %}
{%- endif %}
{%- endfor %}
{{- '<start>model\n' if add_generation_prompt }}"""

STRICT = """\
{%- for turn in messages %}
{%- if turn.role not in ('user', 'assistant') %}
{{- raise_exception('this model knows no ' ~ turn.role ~ ' role') }}
{%- endif %}
{{- turn.role | upper }}: {{ turn.content | replace('\n', ' ') }}{{ '\n' }}
{%- endfor %}
{{- 'ASSISTANT:' if add_generation_prompt else eos_token }}"""

DOCUMENTS = """\
{{- bos_token }}
{%- if documents %}{% for document in documents %}
{{- '[' ~ loop.index ~ '] ' ~ document.title ~ ': ' ~ document.text ~ '\n' }}
{%- endfor %}{% endif %}
{%- if enable_thinking is defined and not enable_thinking %}<quick>{% endif %}
{%- for turn in messages %}
{%- if turn.role == 'assistant' and turn.reasoning_content is defined %}
{{- '<think>' ~ turn.reasoning_content ~ '</think>' }}{% endif %}
{{- turn.role ~ '> ' ~ turn.content.split('</think>')[-1] ~ '\n' }}
{%- endfor %}
{%- for key, value in (more or {}).items() %}{{ key }}={{ value | tojson(indent=2) }}{% endfor %}
{{- 'assistant> ' if add_generation_prompt }}"""

TEMPLATES = {
    "ChatML": CHATML,
    "Zephyr": ZEPHYR,
    "Alpaca": ALPACA,
    "Vicuna": VICUNA,
    "Mistral v1": MISTRAL_V1,
    "Mistral v3": MISTRAL_V3,
    "Mistral tools": MISTRAL_TOOLS,
    "Llama 2": LLAMA_2,
    "Llama 3": LLAMA_3,
    "merged system": MERGED,
    "refuses roles": STRICT,
    "documents": DOCUMENTS,
}
