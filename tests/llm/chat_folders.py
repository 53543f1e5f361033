"""Tokenizer folders in the manner of Qwen 2.5, Qwen 3 and Llama 3, small and made here, for tests."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, processors

from pathflip_jax.llm.tokenizer import END, train_bpe

TEXTS = (
    "What is the diagnosis? The tumor is an adenocarcinoma of 1.8 cm, grade 2.",
    "Describe the input pathology whole slide image. Glands infiltrate the stroma; necrosis is extensive.",
    "Is it malignant? Yes, it is. <|im_start|>user assistant system <think> I think </think>",
)
QWEN25 = """{%- if tools %}{{- raise_exception('no tools here') }}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Thoughts of earlier turns are dropped; the last answer has its own or an empty block.
QWEN3 = """{%- set ns = namespace(asked=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is not string %}{%- continue %}{%- endif %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {%- set content, thought = message.content, '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.asked and (loop.last or thought) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- generation %}{{- message['content'] | trim }}{{- '<|eot_id|>' }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
SPECIAL = {
    "qwen2.5": ("<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
TEMPLATE = {"qwen2.5": QWEN25, "qwen3": QWEN3, "llama3": LLAMA3}


def make_folder(folder: Path, kind: str) -> Path:
    """A folder as such a model has it, with the template where its publisher puts it."""
    train_bpe(TEXTS * 3, folder, vocab_size=400)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL[kind]])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": END}
    if kind == "llama3":
        bos = SPECIAL[kind][0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": "<|eot_id|>"}
        (folder / "chat_template.jinja").write_text(LLAMA3)
        ends = [tokenizer.token_to_id(END), tokenizer.token_to_id("<|eot_id|>")]
    elif kind == "qwen3":
        thoughts = ("<think>", "</think>")
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in thoughts])
        end = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
        config |= {"eos_token": end, "add_bos_token": False, "bos_token": None}
        config["chat_template"] = [{"name": "tool_use", "template": "-"}, {"name": "default", "template": QWEN3}]
        ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id(END)]
    else:
        config |= {"eos_token": END, "chat_template": QWEN25}
        ends = tokenizer.token_to_id(END)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder
