"""Chat templates in the style of well-known model families, written for these tests, over
byte-level tokenizers built in memory.

Every tokenizer has ids 0.. for its special tokens and one token per byte, so expectations can be
worked out by hand; `merges` adds a few merged tokens, to see boundaries merge.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = """{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

QWEN25 = (
    """{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}{% endif %}"""
    + CHATML
)

QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
  {%- if m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}
    {%- set ns.last = loop.index0 %}
  {%- endif %}
{%- endfor %}
{%- for m in messages %}
  {%- if m.role == 'assistant' and '</think>' in m.content and loop.index0 < ns.last %}
    {{- '<|im_start|>assistant\\n' + m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
  {%- else %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA3 = """{{- bos_token }}
{%- for m in messages %}
  {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

GEMMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
  {%- if m['role'] not in ['user', 'assistant'] or (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('Roles must alternate user/assistant') }}
  {%- endif %}
  {{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

MISTRAL = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
  {%- set system = messages[0]['content'] + '\\n\\n' %}{%- set rest = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set rest = messages %}{%- endif %}
{%- for m in rest %}
  {%- if m['role'] == 'user' %}{{- '[INST]' + (system if loop.first else '') + m['content'] + '[/INST]' }}
  {%- elif m['role'] == 'assistant' %}{{- m['content'] + eos_token }}
  {%- else %}{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}
{%- endfor %}"""

# a system message that stands before the last user message, wherever that is: an earlier prompt is
# no beginning of a later one
MOVING = MISTRAL.replace("loop.first", "loop.last")

# Llama 2: a space stands between an answer and its end token
LLAMA2 = """{%- if messages[0]['role'] == 'system' %}
  {%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{%- set rest = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set rest = messages %}{%- endif %}
{%- for m in rest %}
  {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
  {%- endif %}
  {%- if m['role'] == 'user' %}
    {{- bos_token + '[INST] ' + (system if loop.first else '') + m['content'] | trim + ' [/INST]' }}
  {%- else %}{{- ' ' + m['content'] | trim + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""

NEWLINE_END = """{%- for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '\\n<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

# Phi 3: the end of a text, which is the tokenizer's eos, stands after the whole chat only
PHI3 = """{%- for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

# gpt-oss: one answer holds several messages; each ends with <|end|>, the last one with <|return|>
HARMONY = """{{- '<|start|>system<|message|>Today: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
    {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
  {%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

# Cohere: an answer is framed by two tokens
FRAMED = """{%- for m in messages %}
  {{- '<|turn|>' + ('<|bot|><|say|>' + m.content + '<|said|>' if m.role == 'assistant' else '<|' + m.role + '|>' + m.content) + '<|over|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn|><|bot|><|say|>' }}{%- endif %}"""

# template, special tokens, bos, eos, variables
ENDS: dict[str, tuple[str, tuple[str, ...], str | None, str, dict[str, str]]] = {
    "llama2": (LLAMA2, ("<s>", "</s>"), "<s>", "</s>", {}),
    "newline": (
        NEWLINE_END,
        ("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
        None,
        "<|endoftext|>",
        {},
    ),
    "phi3": (
        PHI3,
        ("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
        None,
        "<|endoftext|>",
        {},
    ),
    "harmony": (
        HARMONY,
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
        None,
        "<|return|>",
        {"strftime_now": "2024-07-26"},
    ),
    "framed": (
        FRAMED,
        ("<|turn|>", "<|bot|>", "<|user|>", "<|system|>", "<|say|>", "<|said|>", "<|over|>"),
        None,
        "<|over|>",
        {},
    ),
}

FAMILIES: dict[
    str, tuple[str, tuple[str, ...], str | None, str]
] = {  # template, special tokens, bos, eos
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>"),
    "qwen2.5": (QWEN25, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>"),
    "qwen3": (QWEN3, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>"),
    "llama3": (
        LLAMA3,
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ),
    "gemma": (GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
    "mistral": (MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>"),
    "moving": (MOVING, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>"),
}


def byte_tokenizer(
    template: str,
    specials: tuple[str, ...],
    bos: str | None,
    eos: str | None,
    *,
    words: tuple[str, ...] = (),
    merges: tuple[tuple[str, str], ...] = (),
) -> PreTrainedTokenizerFast:
    """Ids: special tokens first, then one per byte, then one per merge. `words` are added tokens
    that are not special."""
    pieces = [
        *specials,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *("".join(pair) for pair in merges),
    ]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    core.add_tokens([AddedToken(w, special=False, normalized=False) for w in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, chat_template=template
    )


def family(name: str, **settings: object) -> PreTrainedTokenizerFast:
    return byte_tokenizer(*FAMILIES[name], **settings)  # type: ignore[arg-type]
