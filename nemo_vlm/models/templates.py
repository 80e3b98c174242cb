"""Conversation templates: how turns become text, and which of it is trained on.

They are NeMo's (nemo/collections/multimodal/data/neva/conversation.py and the preprocess_* of neva_dataset.py, 2.0.0),
to the letter. Where those write <extra_id_6> and <extra_id_7> for a tokenizer's BOS and EOS, these are written here.
NeMo's are not: v1_fork, chatml (as the chat templates of Qwen3 and Qwen3-VL have it) and qwen2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nemo_vlm.batch import IMAGE_TAG, VIDEO_TAG
from nemo_vlm.config import DataConfig, LanguageConfig

PLACEHOLDERS = re.compile(f"{IMAGE_TAG}|{VIDEO_TAG}")
BOS, EOS = "{bos}", "{eos}"  # the tokenizer's, in a template's texts


@dataclass(frozen=True)
class Turn:
    """One question and its answer; None where the answer is to be generated.

    Attributes:
        label: what SteerLM's data say about the answer.
    """

    question: str
    answer: str | None
    label: str | None = None


def spoken(turns: Sequence[Turn]) -> str:
    """All that is said, in order."""
    return "".join(turn.question + (turn.answer or "") for turn in turns)


@dataclass(frozen=True)
class Segment:
    """A part of a conversation's text.

    Attributes:
        said: somebody said it; what looks like a special token there is none.
    """

    text: str
    trained: bool = False
    said: bool = False


@dataclass(frozen=True)
class Template:
    """The texts around what is said.

    Attributes:
        system: the system message that a conversation has if none is given.
        start: in front of everything, after the BOS.
        around_system: what stands around a system message that is not empty.
        first, next: in front of the first question, and of each other one.
        prompt: between a question and its answer. A generated answer begins behind it.
        around_answer: what stands around an answer, and is trained on with it.
        end: behind the last answer.
        around_label: what stands around a label, behind `prompt`.
        label: of an answer that has none; None: it goes without.
        trims: spaces around a question are removed.
        captions: there is one turn, and nothing is left of its question but the images.
    """

    system: str = ""
    start: str = ""
    around_system: tuple[str, str] = ("", "")
    first: str = ""
    next: str = ""
    prompt: str = ""
    around_answer: tuple[str, str] = ("", EOS)
    end: str = ""
    around_label: tuple[str, str] | None = None
    label: str | None = None
    trims: bool = False
    captions: bool = False


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
STEERLM_LABEL = (
    "quality:4,toxicity:0,humor:0,creativity:0,helpfulness:4,correctness:4,coherence:4,complexity:4,verbosity:4"
)
V1 = Template(
    system=VICUNA_SYSTEM,
    around_system=("", " "),
    first="USER: ",
    next=" USER: ",
    prompt=" ASSISTANT:",
    around_answer=(" ", EOS),
)
NV_DPO = Template(
    system="\n",
    start="<extra_id_0>System\n",
    first="<extra_id_1>User\n",
    next="User\n",
    prompt="\n<extra_id_1>Assistant\n",
    around_answer=("", "\n<extra_id_1>"),
    around_label=("<extra_id_2>", "\n"),
)
NVGPT = replace(NV_DPO, system=f"{VICUNA_SYSTEM}\n\n", label=STEERLM_LABEL)
CHATML = Template(
    around_system=("<|im_start|>system\n", "<|im_end|>\n"),
    first="<|im_start|>user\n",
    next="\n<|im_start|>user\n",
    prompt="<|im_end|>\n<|im_start|>assistant\n",
    around_answer=("", "<|im_end|>"),
    end="\n",
)
LLAMA_3_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
TEMPLATES = {
    "plain": Template(around_answer=("", "\n"), captions=True),
    "v1": V1,
    # as https://github.com/lihengtao/NeMo trains LLaVA, in step with xtuner
    "v1_fork": replace(V1, next=f"\n{BOS}USER: ", end="\n"),
    "llama_2": Template(
        system=LLAVA_SYSTEM,
        start=" [INST] ",
        around_system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        next=f"{BOS} [INST] ",
        prompt=" [/INST]",
        around_answer=(" ", f" {EOS}"),
    ),
    "llama_3": Template(
        system=LLAVA_SYSTEM,
        around_system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        first=LLAMA_3_USER,
        next=LLAMA_3_USER,
        prompt="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        around_answer=("", "<|eot_id|>"),
    ),
    "nvgpt": NVGPT,
    "nv_steerlm": NVGPT,
    "nv_dpo": NV_DPO,
    "mistral": Template(start=" [INST] ", around_system=("", "\n"), next=" [INST] ", prompt=" [/INST]"),
    "yi_34b": replace(CHATML, end="", trims=True),
    "chatml": CHATML,
    # as the chat templates of Qwen2, of Qwen2.5's base models and of Qwen2-VL
    "qwen2": replace(CHATML, system="You are a helpful assistant."),
}


def template_of(model: LanguageConfig, data: DataConfig) -> Template:
    """The one that the data name, else the family's own."""
    return TEMPLATES[data.conv_template or model.conv_template]


def segments(template: Template, turns: Sequence[Turn], system: str | None, bos: str, eos: str) -> list[Segment]:
    """The text of a conversation, without the BOS that stands in front of it.

    Args:
        system: None: the template's own.
    """
    own, system = system is None, template.system if system is None else system
    found = [Segment(template.start)]
    if system:
        before, after = template.around_system
        found += [Segment(before), Segment(system, said=not own), Segment(after)]
    for number, turn in enumerate(turns):
        found.append(Segment(template.next if number else template.first))
        found += asked(template, turn) + answered(template, turn)
    if turns[-1].answer is not None:
        found.append(Segment(template.end))
    marked = [part if part.said else replace(part, text=part.text.format(bos=bos, eos=eos)) for part in found]
    return [part for part in marked if part.text]


def asked(template: Template, turn: Turn) -> list[Segment]:
    """A question, up to where its answer begins."""
    question = turn.question.strip() if template.trims else turn.question
    if template.captions:
        question = "".join(PLACEHOLDERS.findall(question))
    found = [Segment(question, said=True), Segment(template.prompt)]
    label = template.label if turn.label is None else turn.label
    if template.around_label is not None and label is not None:
        before, after = template.around_label
        found += [Segment(before), Segment(label, said=True), Segment(after)]
    return found


def answered(template: Template, turn: Turn) -> list[Segment]:
    if turn.answer is None:
        return []
    before, after = template.around_answer
    return [Segment(before, True), Segment(turn.answer, True, said=True), Segment(after, True)]
