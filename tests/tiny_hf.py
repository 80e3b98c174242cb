"""Small random models as transformers saves them, with tokenizer and processor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from nemo_vlm.data.tokenizer import train_tokenizer

LLAMA = dict(  # grouped queries, heads x head size != hidden size, a vocabulary and layers that do not divide by two
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=307,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
)
TOWER = dict(
    hidden_size=40, intermediate_size=80, num_hidden_layers=3, num_attention_heads=5, image_size=28, patch_size=7
)
TEXTS = ["USER: What is in the picture? ASSISTANT: A red square and 7 blue circles."]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer() -> Any:
    """Llama's special tokens, of which it puts BOS in front, and <image>; LLaVA's kind of chat template."""
    made = train_tokenizer(TEXTS, 300)
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.chat_template = TEMPLATE
    return made


def random_weights(model: Any, std: float = 0.2) -> Any:
    """Every parameter random, biases and norms too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, std, generator=generator)
    return model


def make_llama(folder: Path, **settings: Any) -> Path:
    config = transformers.LlamaConfig(**LLAMA | settings)
    random_weights(transformers.LlamaForCausalLM(config)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def qwen_tokenizer(
    folder: Path, special: Sequence[str] = ("<|im_start|>",), texts: Sequence[str] = TEXTS, size: int = 300
) -> Any:
    """As Qwen's, saved with the vocab.json and merges.txt that the hub has beside it; the EOS ends a turn."""
    bpe = json.loads(train_tokenizer(texts, size).backend_tokenizer.to_str())["model"]
    vocabulary = {token: number for token, number in bpe["vocab"].items() if number >= 5}  # no special tokens of ours
    vocabulary = {token: number for number, token in enumerate(vocabulary)}
    made = transformers.Qwen2Tokenizer(
        vocabulary,
        [tuple(pair) for pair in bpe["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(special),
    )
    made.chat_template = QWEN_TEMPLATE
    made.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in bpe["merges"]))
    return made


VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_VL_TEMPLATE = (  # Qwen2-VL's, without its numbering of images
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a "
    "helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen2_vl_tokenizer(folder: Path) -> Any:
    """Qwen's with the tokens that stand for images and videos and around them."""
    made = qwen_tokenizer(folder, ["<|im_start|>", *VISION_TOKENS])
    made.chat_template = QWEN_VL_TEMPLATE
    made.save_pretrained(folder)
    return made


HALVES: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
QWEN3_VL_TEMPLATE = (  # Qwen3-VL's, without its numbering of images and without tools
    "{% if messages[0]['role'] == 'system' %}<|im_start|>system\n{% if messages[0]['content'] is string %}"
    "{{ messages[0]['content'] }}{% else %}{% for content in messages[0]['content'] %}{% if 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' or message['role'] == 'assistant' %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen3_vl_tokenizer(folder: Path) -> Any:
    """Which joins a question's last mark with the bracket of the time behind it, as Qwen's does."""
    joined = [f"Which{mark}<{second}.5 seconds>" for mark in ("?", " (", "。") for second in range(10)]
    made = qwen_tokenizer(folder, ["<|im_start|>", *VISION_TOKENS], TEXTS + joined, 330)
    made.chat_template = QWEN3_VL_TEMPLATE
    made.save_pretrained(folder)
    return made


def make_qwen2_vl(folder: Path, tied: bool = False, **settings: Any) -> Path:
    """A Qwen2-VL that sees 4 to 16 tokens of an image or of two frames; HF's processor of videos needs torchvision."""
    made = qwen2_vl_tokenizer(folder)
    names = ("vision_start", "vision_end", "image", "video")
    text = LLAMA | dict(
        rms_norm_eps=1e-6, vocab_size=len(made) + 17, eos_token_id=made.eos_token_id, num_hidden_layers=4
    )
    del text["head_dim"]
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3])
    config = transformers.Qwen2VLConfig(
        text_config=text | dict(hidden_size=64, rope_parameters=rope) | settings,
        vision_config=dict(depth=2, embed_dim=48, num_heads=4, mlp_ratio=2, hidden_size=64),
        tie_word_embeddings=tied,
        **{f"{name}_token_id": made.convert_tokens_to_ids(t) for name, t in zip(names, VISION_TOKENS, strict=True)},
    )
    random_weights(transformers.Qwen2VLForConditionalGeneration(config)).save_pretrained(folder)
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 16 * 28 * 28}
    transformers.Qwen2VLImageProcessorPil(size=size).save_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"size": size}))
    return folder


def make_qwen3_vl(folder: Path, moe: bool = False, tied: bool = False, on_hub: bool = True, **settings: Any) -> Path:
    """A Qwen3-VL that sees 4 to 16 tokens of an image or of two frames; on_hub: experts' axes as on the hub."""
    made = qwen3_vl_tokenizer(folder)
    names, kind = ("vision_start", "vision_end", "image", "video"), "Qwen3VLMoe" if moe else "Qwen3VL"
    text = LLAMA | dict(rms_norm_eps=1e-6, vocab_size=len(made) + 17, num_hidden_layers=4, hidden_size=64)
    if moe:
        text |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, mlp_only_layers=[])
    rope = dict(rope_type="default", rope_theta=5e6, mrope_section=[4, 2, 2], mrope_interleaved=True)
    tower = dict(depth=4, hidden_size=48, intermediate_size=80, num_heads=4, deepstack_visual_indexes=[0, 1, 3])
    config = getattr(transformers, f"{kind}Config")(
        text_config=text | dict(rope_parameters=rope) | settings,
        vision_config=tower | dict(num_position_embeddings=16, out_hidden_size=64),
        tie_word_embeddings=tied,
        **{f"{name}_token_id": made.convert_tokens_to_ids(t) for name, t in zip(names, VISION_TOKENS, strict=True)},
    )
    random_weights(getattr(transformers, f"{kind}ForConditionalGeneration")(config)).save_pretrained(folder)
    if moe and on_hub:
        turn_experts(folder / "model.safetensors")
    size = {"shortest_edge": 4 * 32 * 32, "longest_edge": 16 * 32 * 32}
    transformers.Qwen2VLImageProcessorPil(patch_size=16, size=size, **HALVES).save_pretrained(folder)
    videos = {"video_processor_type": "Qwen3VLVideoProcessor", "size": size, "patch_size": 16, **HALVES}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos | {"cap_pixels_per_frame": False}))
    return folder


def turn_experts(file: Path) -> None:
    """The hub's layout of experts to that of transformers 5, or back."""
    found = load_file(file)
    for name in [name for name in found if ".mlp.experts." in name]:
        found[name] = found[name].mT.contiguous()
    save_file(found, file, {"format": "pt"})


def make_qwen(folder: Path, kind: str = "qwen2", **settings: Any) -> Path:
    """With more rows than its tokenizer has tokens, as on the hub; Qwen2's ties its embeddings unless told not to."""
    made = qwen_tokenizer(folder)
    shape = LLAMA | dict(rms_norm_eps=1e-6, rope_theta=1e6, eos_token_id=made.eos_token_id, vocab_size=len(made) + 17)
    if kind == "qwen2":  # as many heads and groups as Qwen2.5 0.5B
        del shape["head_dim"]
        shape |= dict(hidden_size=112, num_attention_heads=14, tie_word_embeddings=True)
    config = transformers.AutoConfig.for_model(kind, **shape | settings)
    random_weights(transformers.AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    return folder


def make_llava(folder: Path, text: dict[str, Any] | None = None, tower: dict[str, Any] | None = None) -> Path:
    made = tokenizer()
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER | (tower or {})),
        text_config=transformers.LlamaConfig(**LLAMA | (text or {})),
        image_token_index=made.convert_tokens_to_ids("<image>"),
    )
    random_weights(transformers.LlavaForConditionalGeneration(config)).save_pretrained(folder)
    edge = config.vision_config.image_size
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})
    transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=made,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def make_clip(folder: Path, whole: bool = False) -> Path:
    """A vision tower alone, or with CLIP's text model."""
    if not whole:
        random_weights(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER))).save_pretrained(folder)
        return folder
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    text |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = transformers.CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=32)
    random_weights(transformers.CLIPModel(config)).save_pretrained(folder)
    return folder
