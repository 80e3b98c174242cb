"""The decoder-only language model of every family: Megatron's GPTModel."""

from __future__ import annotations

from dataclasses import replace

from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from nemo_vlm.batch import IGNORE_INDEX, Batch
from nemo_vlm.config import LanguageConfig
from nemo_vlm.mcore.cache import Cache
from nemo_vlm.mcore.config import BuildContext, forget_attention_choice, language_config
from nemo_vlm.mcore.context import Split, split_batch
from nemo_vlm.mcore.cross_entropy import LanguageModel, Targets, labelled
from nemo_vlm.mcore.decoder_layer import DecoderLayer, can_pick
from nemo_vlm.mcore.decoding import decode_cached
from nemo_vlm.mcore.deepstack import DeepStackLayer, take_features, with_unused
from nemo_vlm.mcore.experts import PADDING, loss_weights, prepare
from nemo_vlm.mcore.groups import Stage
from nemo_vlm.mcore.layers import layer_spec, norm_class
from nemo_vlm.mcore.packed import packed_batch
from nemo_vlm.mcore.rotary import MultimodalRotary, TextRotary


def build_gpt(model: LanguageConfig, build: BuildContext, stage: Stage) -> GPTModel:
    """This stage's part of the language model; initial values are left to mcore.weights."""
    assert model.vocab_size is not None, "the vocabulary size is settled before a model is built"
    config = language_config(model, build)
    layer = layer_spec(config, build.kernels, causal=True, own_positions=bool(model.mrope_section))
    layer.module = DeepStackLayer if model.deepstack_layers else DecoderLayer
    forget_attention_choice()
    gpt = LanguageModel(
        config,
        TransformerBlockSubmodules([layer] * stage.num_layers, norm_class(config, build.kernels)),
        vocab_size=padded_vocab_size(model, build.layout.tensor),
        max_sequence_length=model.encoder_seq_length,
        pre_process=stage.first,
        post_process=stage.last,
        position_embedding_type="mrope" if model.mrope_section else "rope",
        rotary_base=model.rotary_base,  # type: ignore[arg-type]
        seq_len_interpolation_factor=model.seq_len_interpolation_factor,
        rope_scaling=model.rope_scaling_factor is not None,
        rope_scaling_factor=model.rope_scaling_factor or 1.0,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        scatter_embedding_sequence_parallel=False,  # vision features are merged into the whole sequence first
        vp_stage=stage.chunk,
        num_tokens=model.vocab_size,
    )
    if model.num_moe_experts:
        prepare(gpt.decoder)
    if model.mrope_section:
        gpt.rotary_pos_emb = MultimodalRotary(model.rotary_base, model.mrope_interleaved)
    elif build.kernels == "local":
        gpt.rotary_pos_emb.__class__ = TextRotary  # GPTModel leaves no choice
    return gpt


def padded_vocab_size(model: LanguageConfig, tensor_parallel_size: int) -> int:
    """The vocabulary rounded up so that every rank gets an equal part of a multiple of make_vocab_size_divisible_by."""
    multiple = model.make_vocab_size_divisible_by * tensor_parallel_size
    return -(-model.vocab_size // multiple) * multiple  # type: ignore[operator]


def embed(gpt: GPTModel, tokens: Tensor) -> Tensor:
    """Word embeddings [s, b, h] of tokens [b, s], whole on every tensor-parallel rank."""
    return gpt.embedding(tokens, position_ids=None)


def decode(
    gpt: GPTModel,
    embeddings: Tensor | None,
    batch: Batch,
    labels: Tensor | None,
    cache: Cache | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Run this stage's layers.

    Args:
        embeddings: [s, b, h], or wider, see mcore.deepstack, on the first stage; elsewhere None, the schedule has set
            the input.
        cache: for generation, see mcore.decoding.
        positions: [3, b, s], where the model has M-RoPE.
    Returns:
        The losses [b, s] on the last stage where labels are given, its logits [b, s, vocab / tp] where they are not,
        hidden states [s, b, h] on the other stages.
    """
    if cache is not None:
        return decode_cached(gpt, embeddings, batch.tokens.shape[1], cache, positions)
    if gpt.config.context_parallel_size > 1:
        return decode_split(gpt, embeddings, batch, labels, positions)
    targets = None if labels is None else targets_of(labels, batch)
    return run_layers(gpt, embeddings, targets, positions, packed_batch(batch), loss_weights(batch))


def targets_of(labels: Tensor, batch: Batch) -> Targets:
    at_hand = batch.at_hand.labels if labels is batch.labels else labels
    return Targets(labels, batch.token_weights, labelled(at_hand).to(labels.device, non_blocking=True))


def decode_split(
    gpt: GPTModel, embeddings: Tensor | None, batch: Batch, labels: Tensor | None, positions: Tensor | None
) -> Tensor:
    """As decode, on this context-parallel rank's part of the samples; losses and logits are of all of them again."""
    split = split_batch(batch, gpt.config)
    positions = None if positions is None else split.part(positions, 2)
    embeddings = None if embeddings is None else split.part(embeddings, 0)
    targets = None if labels is None else split_targets(split, labels, batch.token_weights)
    weights = loss_weights(batch)
    weights = None if weights is None else split.part(weights, 1).masked_fill(split.padding, PADDING)
    output = run_layers(gpt, embeddings, targets, positions, packed_batch(batch, split.lengths), weights)
    return split.whole(output) if gpt.post_process else output


def split_targets(split: Split, labels: Tensor, weights: Tensor | None) -> Targets:
    """This rank's part; padding, which repeats a position, has no label."""
    labels = split.part(labels, 1).masked_fill(split.padding, IGNORE_INDEX)
    return Targets(labels, None if weights is None else split.part(weights, 1))


def run_layers(
    gpt: GPTModel,
    embeddings: Tensor | None,
    targets: Targets | None,
    positions: Tensor | None,
    packed: PackedSeqParams | None,
    weights: Tensor | None,
) -> Tensor:
    """Megatron's forward pass, from embeddings that are whole on every tensor-parallel rank; weights: loss_weights'."""
    if embeddings is not None and gpt.config.sequence_parallel:
        embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings)
    if weights is not None and gpt.config.sequence_parallel:
        weights = tensor_parallel.scatter_to_sequence_parallel_region(weights.T).T
    embeddings, features = take_features(gpt, embeddings)
    if targets is not None and can_pick(gpt, features):
        places = labelled(targets.labels) if targets.places is None else targets.places
        targets = replace(targets, places=places, picked=len(places) > 0)  # no kernel has to take no rows
    output = gpt(
        None,
        positions,
        None,
        decoder_input=embeddings,
        labels=targets,
        packed_seq_params=packed,
        padding_mask=weights,
        extra_block_kwargs={
            "context": features,
            "context_mask": targets.places if targets and targets.picked else None,
        },
    )
    return with_unused(gpt, output, features)
