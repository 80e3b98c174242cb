"""The keys of MindSpeed-MM's data.json and model.json for Qwen2-VL, of all their versions."""

from __future__ import annotations

from nemo_vlm.porting import mindspeed_data as records
from nemo_vlm.porting import mindspeed_rules as rules
from nemo_vlm.porting.flags import given as key
from nemo_vlm.porting.mindspeed_rules import ATTR, BASIC, LOADER, PREPROCESS, PROJECTOR, TEXT, TOWER, VISION, exactly
from nemo_vlm.porting.table import Argument, Check, one_of, rate, text, to, truth, whole


def passed(branch: str, names: str, why: str, check: Check = text) -> tuple[Argument, ...]:
    """Keys that nothing takes the place of."""
    return tuple(key(f"{branch}.{name}", f"nothing: {why}", check) for name in names.split())


def only(name: str, right: str, why: str) -> Argument:
    """A key with a single value that makes sense here; null is fine as well."""
    return key(name, f"nothing: {why}", exactly(right, why), unheeded=f"another than {right or 'null'}: error")


def number(name: str, own: str) -> Argument:
    """A number of the language model, which its preset holds."""
    return key(f"{TEXT}.{name}", f"the preset; another number: `{own}`", whole(1), rules.sized(own))


def shared(name: str, own: str, usual: float) -> Argument:
    """A number that all sizes have."""
    return key(f"{TEXT}.{name}", f"the preset, {usual:g}; another: `{own}`", rate, rules.usual(own, usual))


def same(name: str, other: str, times: str = "") -> Argument:
    """A number that follows from others."""
    here = f"nothing: as `{other}`" + (", a block of them" if times else "")
    return key(name, here, whole(1), rules.same_as(other, times), "another: error")


def tower(name: str, own: str, usual: float) -> Argument:
    here = f"the preset, {usual:g}; another: `{TOWER}.{own}`"
    return key(f"{VISION}.{name}", here, rate, rules.usual(f"{TOWER}.{own}", usual))


DATA = (
    only("dataset_param.dataset_type", "huggingface", "records as JSON"),
    key(f"{PREPROCESS}.model_name_or_path", "`model.tokenizer.type`", text, rules.place("model.tokenizer.type")),
    key(f"{PREPROCESS}.use_fast_tokenizer", "`model.tokenizer.use_fast`", truth, to("model.tokenizer.use_fast")),
    only(f"{PREPROCESS}.split_special_tokens", "false", "special tokens stay whole"),
    key(
        f"{PREPROCESS}.image_resolution",
        "`model.data.max_pixels`, its square; above 4096 (2.0.0's pixels) as it is",
        whole(1),
        records.most_pixels("max_pixels"),
        "the longest side, by NEAREST: a note",
    ),
    key(
        f"{PREPROCESS}.video_resolution",
        "`model.data.video_max_pixels`, its square; above 4096 as it is; `model.data.video_min_pixels=3136`",
        whole(1),
        records.most_pixels("video_max_pixels"),
        "the longest side, by NEAREST: a note",
    ),
    key(f"{PREPROCESS}.image_max_pixels", "`model.data.max_pixels`", whole(1), records.most_pixels("max_pixels")),
    key(
        f"{PREPROCESS}.image_min_pixels",
        "`model.data.min_pixels`, 3136 or more, which Hugging Face's processor behind it asks for",
        whole(0),
        records.least_pixels("min_pixels"),
    ),
    key(
        f"{PREPROCESS}.video_max_pixels",
        "`model.data.video_max_pixels`",
        whole(1),
        records.most_pixels("video_max_pixels"),
    ),
    key(
        f"{PREPROCESS}.video_min_pixels",
        "`model.data.video_min_pixels`, 3136 or more",
        whole(0),
        records.least_pixels("video_min_pixels"),
    ),
    key(f"{PREPROCESS}.video_fps", "`model.data.video_fps`", rate, to("model.data.video_fps")),
    key(
        f"{PREPROCESS}.video_maxlen",
        "`model.data.video_max_frames`, with `model.data.video_min_frames=2`, a pair",
        whole(1),
        records.most_frames,
        "missing, where versions differ: error",
    ),
    only(f"{BASIC}.template", "qwen2vl", "the model's own template holds"),
    key(
        f"{BASIC}.dataset",
        "`model.data.data_path`; with commas: a list, as `[a.json,b.json]`",
        text,
        records.files,
    ),
    key(
        f"{BASIC}.dataset_dir",
        "`model.data.image_folder`, `model.data.video_folder`, where the media are below it; else the folder that the "
        "script is started in",
        text,
        default="data",
    ),
    key(
        f"{BASIC}.cutoff_len",
        "`model.encoder_seq_length`, with `model.data.too_long=truncate`; where it is missing, as from 2.0.0 on: "
        "--seq-length",
        whole(1),
        to("model.encoder_seq_length"),
        "a cut through an image, which crashed: in front of it",
    ),
    key(
        f"{BASIC}.max_samples",
        "nothing: all records are read",
        whole(1),
        records.first_records,
        "the first 1000 alone, whatever the run's length: a note",
    ),
    key(f"{BASIC}.val_dataset", "`model.data.validation_path`", text, rules.place("model.data.validation_path")),
    key(
        f"{BASIC}.val_rate",
        "`model.data.validation_split`",
        rate,
        records.validation_share,
        "beside val_dataset, which goes before it: a note",
    ),
    key(f"{BASIC}.val_max_samples", "nothing: `trainer.limit_val_batches` limits a validation", whole(1)),
    only(f"{BASIC}.train_on_prompt", "false", "only answers are trained"),
    only(f"{BASIC}.mask_history", "false", "all answers of a conversation are trained"),
    only(f"{BASIC}.tool_format", "", "conversations have no tools"),
    *passed(
        BASIC,
        "cache_dir overwrite_cache preprocessing_batch_size preprocessing_num_workers streaming",
        "records are read when they are drawn, and any run can be resumed",
    ),
    key(
        f"{ATTR}.messages",
        "messages: `data=mllm`; conversations, or nothing: `data=sharegpt`",
        one_of("messages", "conversations"),
        records.kind,
        "others: error",
        "conversations",
    ),
    *(
        key(f"{ATTR}.{name}", f"nothing: a record's {name} are known by their name", exactly(name, "is read as it is"))
        for name in ("images", "videos")
    ),
    *(
        key(f"{ATTR}.{name}", f"nothing: {' or '.join(words)} is known", one_of(*words), unheeded="others: error")
        for name, words in {
            "role_tag": ("role", "from"),
            "content_tag": ("content", "value"),
            "user_tag": ("user", "human"),
            "assistant_tag": ("assistant", "gpt"),
        }.items()
    ),
    key(f"{ATTR}.system_tag", "nothing: system is known", exactly("system", "is read as it is")),
    *(
        only(f"{ATTR}.{name}", "", "conversations have a system turn, questions and answers")
        for name in ("system", "observation_tag", "function_tag")
    ),
    only(f"{LOADER}.dataloader_mode", "sampler", "there is one way"),
    *passed(LOADER, "sampler_type drop_last pin_memory", "every sample is read once an epoch"),
    key(
        f"{LOADER}.shuffle",
        "`model.data.dataloader_type`: cyclic, and without it single",
        truth,
        records.order,
        default="false",
    ),
    key(
        f"{LOADER}.batch_size",
        "nothing: `model.micro_batch_size` is --micro-batch-size",
        whole(1),
        records.batch_size,
        "another than --micro-batch-size: error",
    ),
    key(f"{LOADER}.num_workers", "`model.data.num_workers`, without --num-workers", whole(0), records.workers),
    only(f"{LOADER}.collate_param.model_name", "qwen2vl", "the model tells"),
    only(f"{LOADER}.collate_param.ignore_pad_token_for_loss", "true", "padding is never trained"),
)
LANGUAGE = (
    key(
        f"{TEXT}.hidden_size",
        "`model=qwen2_vl_2b` (1536), `model=qwen2_vl_7b` (3584), `model=qwen2_vl_72b` (8192); another: "
        "`model.hidden_size` over the first",
        whole(1),
        rules.sized("model.hidden_size"),
    ),
    number("num_layers", "model.num_layers"),
    number("ffn_hidden_size", "model.ffn_hidden_size"),
    number("num_attention_heads", "model.num_attention_heads"),
    number("num_query_groups", "model.num_query_groups"),
    key(
        f"{TEXT}.kv_channels",
        "the preset, 128; another: `model.kv_channels`",
        whole(1),
        rules.usual("model.kv_channels", 128),
    ),
    number("vocab_size", "model.vocab_size"),
    number("padded_vocab_size", "model.vocab_size"),
    key(
        f"{TEXT}.untie_embeddings_and_output_weights",
        "the preset; another: `model.share_embeddings_and_output_weights`",
        truth,
        rules.untied,
        "missing, where versions differ: error",
    ),
    key(
        f"{TEXT}.max_position_embeddings",
        "the preset, 32768; another: `model.max_position_embeddings`",
        whole(1),
        rules.usual("model.max_position_embeddings", 32768),
    ),
    key(
        f"{TEXT}.rope_theta",
        "the preset, 1e6; another: `model.rotary_base`",
        rate,
        rules.usual("model.rotary_base", 1e6),
    ),
    key(
        f"{TEXT}.mrope_section",
        "the preset, by the size of a head; another than [16,24,24]: `model.mrope_section`",
        rules.is_list,
        rules.sections,
    ),
    key(
        f"{TEXT}.position_embedding_type",
        "nothing: always M-RoPE",
        one_of("rope", "mrope"),
        rules.positions,
        "rope: a note",
    ),
    *(
        key(
            f"{TEXT}.{name}",
            "the preset, 1e-6; another: `model.layernorm_epsilon`",
            rate,
            rules.usual("model.layernorm_epsilon", 1e-6),
        )
        for name in ("layernorm_epsilon", "norm_epsilon")
    ),
    key(f"{TEXT}.init_method_std", "`model.init_method_std`", rate, to("model.init_method_std")),
    key(
        f"{TEXT}.num_layer_list",
        "`model.num_layer_list`, where there are stages",
        rules.is_list,
        rules.first_layers,
        "another than --num-layer-list: error",
    ),
    key(
        f"{TEXT}.pipeline_num_layers",
        "`model.pipeline_layers`; lists in a list: `model.virtual_pipeline_model_parallel_size`, too",
        rules.is_list,
        rules.stages,
    ),
    key(
        f"{TEXT}.recompute_granularity",
        "`model.activations_checkpoint_granularity`",
        one_of("full", "selective"),
        rules.recompute,
    ),
    key(
        f"{TEXT}.recompute_method",
        "`model.activations_checkpoint_method`",
        one_of("uniform", "block"),
        to("model.activations_checkpoint_method"),
    ),
    key(
        f"{TEXT}.recompute_num_layers",
        "`model.activations_checkpoint_num_layers`",
        whole(1),
        to("model.activations_checkpoint_num_layers"),
    ),
    only(f"{TEXT}.model_id", "qwen2lm", "the preset is Qwen2's"),
    only(f"{TEXT}.normalization", "RMSNorm", "the preset is Qwen2's"),
    only(f"{TEXT}.activation_func", "silu", "the preset is Qwen2's"),
    *(
        only(f"{TEXT}.{name}", "true", "the preset is Qwen2's")
        for name in ("gated_linear_unit", "add_qkv_bias", "group_query_attention", "disable_bias_linear")
    ),
    only(f"{TEXT}.add_bias_linear", "false", "the preset is Qwen2's"),
    *(only(f"{TEXT}.{name}", "0.0", "there is no dropout") for name in ("attention_dropout", "hidden_dropout")),
    only(f"{TEXT}.rope_scaling", "", "M-RoPE is not scaled"),
    *passed(
        TEXT,
        "rope_scaling_factor rope_scaling_original_max_position_embeddings rope_scaling_type",
        "of no effect there either, as position_embedding_type says",
    ),
    *passed(
        TEXT,
        "seq_length micro_batch_size global_batch_size make_vocab_size_divisible_by lr lr_decay_style",
        "the script's flags say it, there too",
    ),
    *passed(
        TEXT,
        "params_dtype bf16 ps_version parallel_output use_fused_rmsnorm use_fused_rotary_pos_emb "
        "use_rotary_position_embeddings use_fused_swiglu no_masked_softmax_fusion attention_softmax_in_fp32",
        "the kernels are chosen by what is installed, the precision by --bf16",
    ),
)
MODEL = (
    key(
        "model_id",
        "`model=`, by text_decoder.hidden_size",
        exactly("qwen2vl", "of other models see their READMEs"),
        rules.model,
    ),
    key(
        "img_context_token_id",
        "nothing: the tokenizer tells; another than 151655: `model.mm_cfg.image_token_index`",
        whole(0),
        rules.placeholder,
        "151656, videos in place of images: both, with a note",
    ),
    only("video_token_id", "151656", "the tokenizer tells"),
    only("vision_start_token_id", "151652", "the tokenizer tells"),
    only("text_encoder", "", "Qwen2-VL has none"),
    only("video_encoder", "", "Qwen2-VL has none"),
    *(key(name, "nothing: --bf16 tells", text) for name in ("params_dtype", "ps_version")),
    *LANGUAGE,
    tower("num_layers", "num_layers", 32),
    tower("hidden_size", "hidden_size", 1280),
    tower("ffn_hidden_size", "ffn_hidden_size", 5120),
    tower("num_attention_heads", "num_attention_heads", 16),
    tower("patch_size", "patch_dim", 14),
    tower("spatial_merge_size", "spatial_merge_size", 2),
    tower("temporal_patch_size", "temporal_patch_size", 2),
    tower("layernorm_epsilon", "layernorm_epsilon", 1e-6),
    key(
        f"{VISION}.freeze",
        f"`{TOWER}.freeze`",
        truth,
        rules.frozen(f"{TOWER}.freeze"),
        "false, which the first version froze: trained, with a note; missing, where versions differ: error",
    ),
    key(
        f"{VISION}.pipeline_num_layers",
        "nothing: the tower stands on the first stage",
        rules.is_list,
        rules.tower_stages,
        "a tower on several stages: error",
    ),
    same(f"{VISION}.llm_hidden_size", f"{TEXT}.hidden_size"),
    only(f"{VISION}.model_id", "qwen2vit", "the preset is Qwen2-VL's"),
    only(f"{VISION}.activation_func", "quick_gelu", "the preset is Qwen2-VL's"),
    only(f"{VISION}.normalization", "LayerNorm", "the preset is Qwen2-VL's"),
    only(f"{VISION}.in_channels", "3", "images have three colours"),
    only(f"{VISION}.window_size", "", "Qwen2-VL's tower has no windows"),
    only(f"{VISION}.post_layer_norm", "false", "the preset is Qwen2-VL's"),
    *(only(f"{VISION}.{name}", "0.0", "there is no dropout") for name in ("attention_dropout", "hidden_dropout")),
    *passed(
        VISION,
        "spatial_patch_size apply_rope_fusion use_fused_rotary_pos_emb attention_mask_type fp16 bf16 params_dtype",
        "the kernels are chosen by what is installed, the precision by --bf16",
    ),
    key(
        f"{PROJECTOR}.freeze",
        "`model.mm_cfg.freeze_mm_mlp_adapter`",
        truth,
        rules.frozen("model.mm_cfg.freeze_mm_mlp_adapter"),
        "false, which the first version froze: trained, with a note; missing, where versions differ: error",
    ),
    same(f"{PROJECTOR}.hidden_size", f"{TEXT}.hidden_size"),
    same(f"{PROJECTOR}.input_size", f"{VISION}.hidden_size"),
    same(f"{PROJECTOR}.ffn_hidden_size", f"{VISION}.hidden_size", f"{VISION}.spatial_merge_size"),
    only(f"{PROJECTOR}.model_id", "lnmlp", "the merger is Qwen2-VL's"),
    only(f"{PROJECTOR}.num_layers", "1", "the merger is Qwen2-VL's"),
    only(f"{PROJECTOR}.activation_func", "gelu", "the merger is Qwen2-VL's"),
    only(f"{PROJECTOR}.gated_linear_unit", "false", "the merger is Qwen2-VL's"),
    only(f"{PROJECTOR}.add_bias_linear", "true", "the merger is Qwen2-VL's"),
    only(f"{PROJECTOR}.normalization", "LayerNorm", "the merger is Qwen2-VL's"),
    only(f"{PROJECTOR}.layernorm_epsilon", "1e-06", "the merger's, as the tower's"),
    only(f"{PROJECTOR}.ckpt_path", "", "--load brings all weights"),
    *passed(
        PROJECTOR, "num_attention_heads bias_activation_fusion bf16 params_dtype", "the merger has none, or needs none"
    ),
)
