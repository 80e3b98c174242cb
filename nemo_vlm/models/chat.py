"""Conversation templates as Jinja, for Hugging Face's chat templates: models.templates', to the letter."""

from __future__ import annotations

import json
import re
from typing import Any

from nemo_vlm.batch import IMAGE_TAG, VIDEO_TAG
from nemo_vlm.config import DataConfig, LanguageConfig
from nemo_vlm.data.codec import special_tokens
from nemo_vlm.models.templates import BOS, EOS, Template, template_of

TOKENS = {BOS: "(bos_token or '')", EOS: "eos_token"}
MARKS = re.compile(f"({BOS}|{EOS})")
SIDES = ("BEFORE", "AFTER")

# What a message says: text with tags, or a list of texts, images and videos, which BREAK parts from the others.
CONTENT = (
    "{%- macro tagged(text) -%}{{ text | replace(IMAGE_TAG, IMAGE) | replace(VIDEO_TAG, VIDEO) }}{%- endmacro -%}"
    "{%- macro say(content) -%}"
    "{%- if content is string -%}{{ tagged(content) }}"
    "{%- else -%}{%- for part in content -%}"
    "{%- if part['type'] in ('image', 'video') -%}"
    "{%- set one = IMAGE if part['type'] == 'image' else VIDEO -%}"
    "{{ (one + BREAK) if not loop.last else ((BREAK if not loop.first else '') + one) }}"
    "{%- else -%}{{ tagged(part['text']) }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
)
# Images and videos, in their order, in front of the first question, where model.data.sep_image_conv_front puts them.
IN_FRONT = (
    "{%- macro media(text, behind) -%}"
    "{%- for piece in text.split(IMAGE) -%}"
    "{{ (VIDEO + behind) * piece.count(VIDEO) + (IMAGE + behind if not loop.last else '') }}"
    "{%- endfor -%}"
    "{%- endmacro -%}"
    "{%- macro in_front(text) -%}"
    "{%- set rest = text | replace(IMAGE, '') | replace(VIDEO, '') | trim -%}"
    "{{ (media(text, '\\n') + rest) | trim if media(text, '') else text }}"
    "{%- endmacro -%}"
)
LABELLED = (
    "{%- macro prompt(message) -%}"
    "{%- set label = message['label'] if message['label'] is defined else LABEL -%}"
    "{{ PROMPT + ((LABEL_BEFORE + label + LABEL_AFTER) if label else '') }}"
    "{%- endmacro -%}"
)
PROMPT = "{%- macro prompt(message) -%}{{ PROMPT }}{%- endmacro -%}"
MESSAGES = (
    "{%- set rest = messages[1:] if messages[0]['role'] == 'system' else messages -%}"
    "{%- set system = (say(messages[0]['content']) if messages[0]['role'] == 'system' else '') or SYSTEM -%}"
    "{{ FRONT + START + ((SYSTEM_BEFORE + system + SYSTEM_AFTER) if system else '') }}"
    "{%- for message in rest -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- set text = say(message['content']) -%}"
    "{{ FIRST + QUESTION_FIRST if loop.first else NEXT + QUESTION }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ prompt(message) + ANSWER_BEFORE + say(message['content']) + ANSWER_AFTER }}"
    "{{ END if loop.last and not add_generation_prompt else '' }}"
    "{%- endif -%}{%- endfor -%}"
    "{{ prompt({}) if add_generation_prompt else '' }}"
)


def chat_template(model: LanguageConfig, data: DataConfig, with_bos: bool) -> str:
    """The Jinja template of a run's `model.data.conv_template` and `system_message`.

    Args:
        with_bos: it writes BOS itself, since the tokenizer will not.
    """
    template = template_of(model, data)
    system = template.system if data.system_message is None else data.system_message
    media = model.in_text
    given = {"IMAGE_TAG": IMAGE_TAG, "VIDEO_TAG": VIDEO_TAG, "IMAGE": media.image_text, "VIDEO": media.video_text}
    given |= {"BREAK": media.media_break, "SYSTEM": system}
    texts = texts_of(template) | {"FRONT": BOS if with_bos else ""}
    values = {name: quoted(text) for name, text in given.items()}
    values |= {name: expression(text) for name, text in texts.items()}
    constants = "".join(f"{{%- set {name} = {value} -%}}" for name, value in values.items())
    labelled = LABELLED if template.around_label else PROMPT
    first, later = question(template, data.sep_image_conv_front), question(template, False)
    messages = MESSAGES.replace("QUESTION_FIRST", first).replace("QUESTION", later)
    return constants + CONTENT + IN_FRONT + labelled + messages


def texts_of(template: Template) -> dict[str, str]:
    """The constants of a template by their names in Jinja."""
    label = template.around_label or ("", "")
    pairs = {"SYSTEM": template.around_system, "ANSWER": template.around_answer, "LABEL": label}
    around = {f"{name}_{side}": text for name, pair in pairs.items() for side, text in zip(SIDES, pair, strict=True)}
    names = ("start", "first", "next", "prompt", "end")
    return around | {name.upper(): getattr(template, name) for name in names} | {"LABEL": template.label or ""}


def expression(text: str) -> str:
    """A text in Jinja, with the tokenizer's BOS and EOS in their places."""
    return " + ".join(TOKENS[part] if part in TOKENS else quoted(part) for part in MARKS.split(text))


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def question(template: Template, in_front: bool) -> str:
    """A question in Jinja, from what the user's message says."""
    if template.captions:
        return "media(text, '')"
    said = "in_front(text)" if in_front else "text"
    return f"({said} | trim)" if template.trims else said


def ends_of_answers(model: LanguageConfig, data: DataConfig, tokenizer: Any) -> list[int]:
    """The token beside EOS that ends an answer of the template that a model was trained with, <|im_end|> say."""
    (_, after), special = template_of(model, data).around_answer, special_tokens(tokenizer)
    return [special[after]] if after in special and after != tokenizer.eos_token else []
