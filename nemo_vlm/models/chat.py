"""Conversation templates as Jinja, for Hugging Face's chat templates: models.conversation's, to the letter."""

from __future__ import annotations

import json

from nemo_vlm.batch import IMAGE_TAG
from nemo_vlm.config import DataConfig, LanguageConfig
from nemo_vlm.models.conversation import VICUNA_SYSTEM

# What a message says: text, or a list of texts and images. An image stands on a line of its own.
CONTENT = (
    "{%- macro say(content) -%}"
    "{%- if content is string -%}{{ content | replace(TAG, IMAGE) }}"
    "{%- else -%}{%- for part in content -%}"
    "{%- if part['type'] == 'image' -%}"
    "{{ (IMAGE + '\\n') if not loop.last else (('\\n' if not loop.first else '') + IMAGE) }}"
    "{%- else -%}{{ part['text'] | replace(TAG, IMAGE) }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
)
V1 = (
    "{%- set first = messages[0]['role'] == 'system' -%}"
    "{%- set system = (say(messages[0]['content']) if first else '') or SYSTEM -%}"
    "{{ BOS }}{{ (system + ' ') if system else '' }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ ' ' if loop.index0 > (1 if first else 0) else '' }}{{ 'USER: ' + say(message['content']) }}"
    "{%- elif message['role'] == 'assistant' -%}{{ ' ASSISTANT: ' + say(message['content']) + eos_token }}"
    "{%- endif -%}{%- endfor -%}"
    "{{ ' ASSISTANT:' if add_generation_prompt else '' }}"
)
PLAIN = (
    "{{ BOS }}{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ IMAGE * say(message['content']).count(IMAGE) }}"
    "{%- elif message['role'] == 'assistant' -%}{{ say(message['content']) + '\\n' }}"
    "{%- endif -%}{%- endfor -%}"
)
TEMPLATES = {"v1": V1, "plain": PLAIN}


def chat_template(model: LanguageConfig, data: DataConfig, with_bos: bool) -> str:
    """The Jinja template of a run's `model.data.conv_template` and `system_message`.

    Args:
        with_bos: it writes BOS itself, since the tokenizer will not.
    """
    constants = {
        "TAG": IMAGE_TAG,
        "IMAGE": model.image_placeholder,
        "SYSTEM": VICUNA_SYSTEM if data.system_message is None else data.system_message,
    }
    lines = [f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}" for name, value in constants.items()]
    bos = "(bos_token or '')" if with_bos else "''"
    return "".join(lines) + f"{{%- set BOS = {bos} -%}}" + CONTENT + TEMPLATES[data.conv_template]
