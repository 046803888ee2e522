"""gpt-oss's special tokens and a chat template that does what the published one does."""

SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)

TEMPLATE = """\
{%- macro kind(spec) -%}
{%- if spec.type == 'array' -%}{{- kind(spec['items']) + '[]' if spec['items'] else 'any[]' }}
{%- elif spec.enum -%}{{- '"' + spec.enum | join('" | "') + '"' }}
{%- elif spec.type in ['number', 'integer'] -%}{{- 'number' }}
{%- elif spec.type in ['string', 'boolean', 'object'] -%}{{- spec.type }}
{%- else -%}{{- 'any' }}{%- endif -%}
{%- endmacro -%}
{{- '<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n' }}
{{- 'Knowledge cutoff: 2024-06\nCurrent date: ' + strftime_now('%Y-%m-%d') + '\n\n' }}
{{- 'Reasoning: ' + (reasoning_effort if reasoning_effort is defined else 'medium') + '\n\n' }}
{{- '# Valid channels: analysis, commentary, final. Channel must be included for every message.' }}
{%- if tools %}
{{- "\nCalls to these tools must go to the commentary channel: 'functions'." }}
{%- endif %}
{{- '<|end|>' }}
{%- set told = messages[0].role in ['system', 'developer'] %}
{%- if told or tools %}
{{- '<|start|>developer<|message|>' }}
{%- if told %}{{- '# Instructions\n\n' + messages[0].content }}{% endif %}
{%- if tools %}
{{- '\n\n# Tools\n\n## functions\n\nnamespace functions {\n\n' }}
{%- for tool in tools %}
{{- '// ' + tool.function.description + '\ntype ' + tool.function.name + ' = ' }}
{%- if tool.function.parameters.properties %}
{{- '(_: {\n' }}
{%- for name, spec in tool.function.parameters.properties.items() %}
{{- '// ' + spec.description + '\n' if spec.description }}
{{- name + ('' if name in tool.function.parameters.required or [] else '?') }}
{{- ': ' + kind(spec) }}
{{- ', // default: ' + spec.default if spec.enum and spec.default is defined }}
{{- ',\n' }}
{%- endfor %}
{{- '}) => any;\n\n' }}
{%- else %}
{{- '() => any;\n\n' }}
{%- endif %}
{%- endfor %}
{{- '} // namespace functions' }}
{%- endif %}
{{- '<|end|>' }}
{%- endif %}
{%- set turns = messages[1:] if told else messages %}
{%- set called = namespace(name=none) %}
{%- for message in turns %}
{%- if message.role == 'assistant' %}
{%- for said in [message.content, message.thinking] %}
{%- for channel in ['analysis', 'final'] %}
{%- if said and '<|channel|>' + channel + '<|message|>' in said %}
{{- raise_exception('A message contains <|channel|> tags.') }}
{%- endif %}
{%- endfor %}
{%- endfor %}
{%- if 'tool_calls' in message %}
{%- set later = namespace(answer=false) %}
{%- for one in turns[loop.index:] %}
{%- if one.role == 'assistant' and 'tool_calls' not in one %}
{%- set later.answer = true %}
{%- endif %}
{%- endfor %}
{%- if message.content and message.thinking %}
{{- raise_exception('Content or thinking before a call, not both.') }}
{%- elif not later.answer and (message.content or message.thinking) %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' }}
{{- (message.content or message.thinking) + '<|end|>' }}
{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary ' }}
{{- (call.content_type if call.content_type is defined else 'json') + '<|message|>' }}
{{- call.arguments | tojson + '<|call|>' }}
{%- set called.name = call.name %}
{%- elif loop.last and not add_generation_prompt %}
{%- if 'thinking' in message %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
{%- else %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
{%- set called.name = none %}
{%- endif %}
{%- elif message.role == 'tool' %}
{%- if called.name is none %}
{{- raise_exception('A result must follow a call.') }}
{%- endif %}
{{- '<|start|>functions.' + called.name + ' to=assistant<|channel|>commentary<|message|>' }}
{{- message.content | tojson + '<|end|>' }}
{%- elif message.role == 'user' %}
{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}"""
