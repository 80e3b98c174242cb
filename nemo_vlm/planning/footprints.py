"""What each part of a model keeps of a micro-batch for its backward pass, and works on in either pass, in bytes.

Counted by the tensors that the kernels save. Ours on a CPU are measured (scripts/benchmarks/plan.py); those of
Transformer Engine are read from its sources, and unmeasured where no accelerator is at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nemo_vlm.config import RunConfig
from nemo_vlm.config.peft import PROJECTOR
from nemo_vlm.layout import Layout
from nemo_vlm.mcore.config import DTYPES
from nemo_vlm.mcore.cross_entropy import CHUNK, CHUNK_ON_CPU
from nemo_vlm.mcore.gpt import padded_vocab_size
from nemo_vlm.mcore.vit import VisionShape, recompute_runs
from nemo_vlm.models.base import family
from nemo_vlm.options import offloaded_layers
from nemo_vlm.planning.memory import FP32_BYTES
from nemo_vlm.planning.workload import Workload

LANGUAGE, TOWER = "language_model", "vision_model"


@dataclass(frozen=True)
class Part:
    """Bytes of one part of a rank's chunk for one micro-batch.

    Attributes:
        kept: from the forward pass to the backward pass.
        forward, backward: at most beside that, and beside what the parts in front of it keep, in either pass.
    """

    name: str
    kept: float
    forward: float
    backward: float


@dataclass(frozen=True)
class Shapes:
    """What the parts of a run's model on one rank are made of.

    Attributes:
        size: bytes of a number in the run's precision.
        engine: the layers are Transformer Engine's.
        tokens: positions of a micro-batch in the decoder's attention on this rank.
        split: of these, the ones that stand on this rank outside its products (sequence parallelism).
    """

    run: RunConfig
    layout: Layout
    work: Workload
    size: int
    engine: bool
    tokens: int
    split: int

    @property
    def hidden(self) -> float:
        """Bytes of a hidden state between layers."""
        return self.split * self.run.model.hidden_size * self.size

    def products(self, linear: str) -> int:
        """Bytes of a number that a linear layer of the decoder keeps of its input: in 8 bits it is one."""
        lora = self.run.peft.lora
        if lora is not None and linear in lora.linears:
            return self.size
        return (1 if self.run.step.fp8 else self.size) * self.trains(LANGUAGE)

    def trains(self, part: str) -> bool:
        """Whether the weights of a top-level module train."""
        parts = self.run.model.parts
        frozen_base = self.run.peft.lora is not None and part != PROJECTOR
        return not frozen_base and (part not in parts or not parts[part].freeze)


def engine(run: RunConfig) -> bool:
    """Whether its layers are Transformer Engine's."""
    return run.trainer.accelerator not in ("cpu", "npu") and run.step.transformer_impl != "local"


def tower_shape(run: RunConfig) -> VisionShape:
    return family(run.family, "model").vision_shape(run.model.media.vision_encoder)  # type: ignore[union-attr]


def shapes_of(run: RunConfig, layout: Layout, work: Workload) -> Shapes:
    tokens = -(-work.positions // layout.context)
    split = -(-tokens // layout.tensor) if layout.sequence_parallel else tokens
    return Shapes(run, layout, work, DTYPES[run.trainer.precision].itemsize, engine(run), tokens, split)


def chunk_parts(shapes: Shapes, stage: int, chunk: int) -> list[Part]:
    """The parts of a rank's chunk, in the order of the forward pass."""
    layout = shapes.layout
    number = chunk * layout.pipeline + stage
    first, last = number == 0, number == layout.pipeline * layout.virtual - 1
    return [
        *(seeing(shapes) if first and shapes.run.model.media else []),
        *([embedding(shapes)] if first else []),
        decoder(shapes, layout.stage_layers[number], last),
        *([output(shapes)] if last else []),
    ]


def recomputed(shapes: Shapes, layer: Part, count: int, passed: float) -> Part:
    """Layers one behind the other, some of which keep their input alone and are computed again.

    Args:
        layer: each of them.
        passed: bytes of what goes from layer to layer.
    """
    kept = most = 0.0
    for start, stop, recompute in recompute_runs(count, shapes.run.step):
        whole = (stop - start) * layer.kept
        kept += passed if recompute and whole else whole
        most = max(most, kept + layer.backward + (whole if recompute else 0.0))
    return replace(layer, kept=kept, backward=most - kept)


def picked(shapes: Shapes) -> float:
    """The share of positions that the last layer's MLP takes, see mcore.decoder_layer.can_pick."""
    model, step, layout = shapes.run.model, shapes.run.step, shapes.layout
    every = model.num_moe_experts or layout.sequence_parallel or step.fp8 or step.enable_cuda_graph
    if every or model.deepstack_layers >= model.num_layers:
        return 1.0
    return min(shapes.work.trained_tokens / shapes.work.positions, 1.0)


def decoder(shapes: Shapes, layers: int, last: bool) -> Part:
    """A chunk's layers, the hidden state that they start from, and behind the last the norm."""
    step, layer = shapes.run.step, decoder_layer(shapes)
    part = recomputed(shapes, layer, layers, shapes.hidden)
    share = picked(shapes) if last else 1.0
    here = layers
    if step.cpu_offloading:  # what the first layers keep is not on this device
        here = max(layers - offloaded_layers(step, shapes.run.model.num_layers), 0)
        part = replace(part, kept=part.kept * here / max(layers, 1))
    if here and any(stop == layers > start and not again for start, stop, again in recompute_runs(layers, step)):
        part = replace(part, kept=part.kept - (1 - share) * mlp(shapes))
    return replace(part, kept=part.kept + shapes.hidden * (1 + last * share))


def decoder_layer(shapes: Shapes) -> Part:
    """Two sums, the norms behind them, attention, and SwiGLU or experts."""
    model, width = shapes.run.model, shapes.run.model.ffn_hidden_size / shapes.layout.tensor
    if model.num_moe_experts:
        working = 2 * sent(shapes) * model.hidden_size * shapes.size
    else:
        weight = 2 * width * model.hidden_size * shapes.trains(LANGUAGE)
        working = max(2 * shapes.tokens * width, weight - shapes.tokens * width) * shapes.size
    working += 2 * shapes.hidden
    kept = summed(shapes, "linear_qkv") + attention(shapes) + mlp(shapes)
    return Part("decoder", kept, working, working)


def mlp(shapes: Shapes) -> float:
    """Bytes of a sum, the norm behind it, and SwiGLU or experts."""
    width = shapes.run.model.ffn_hidden_size / shapes.layout.tensor
    if shapes.run.model.num_moe_experts:
        return summed(shapes, "linear_fc1") + experts(shapes)
    inner = shapes.tokens * width * (2 * shapes.size + shapes.products("linear_fc2"))
    return summed(shapes, "linear_fc1") + inner


def summed(shapes: Shapes, linear: str) -> float:
    """Bytes of a sum and of the norm behind it, which a linear layer takes."""
    return shapes.hidden * (1 + shapes.products(linear) / shapes.size)


def attention(shapes: Shapes) -> float:
    """Bytes of queries, keys and values as they come, of the first two rotated, and of what comes out."""
    model, layout = shapes.run.model, shapes.layout
    query = model.num_attention_heads * model.kv_channels / layout.tensor
    key = max(model.num_query_groups / layout.tensor, 1) * model.kv_channels
    sums = FP32_BYTES * shapes.tokens * model.num_attention_heads / layout.tensor
    if layout.context > 1 and not shapes.engine:
        return gathered_attention(shapes, query) + sums
    numbers = (query + 2 * key) + query
    if shapes.engine or model.qk_layernorm:  # elsewhere copies are kept, and what they are made of is not
        numbers += query + key
    if model.qk_layernorm:
        numbers += 2 * query + key
    if not shapes.engine and (shapes.work.packed or shapes.work.samples > 1):
        numbers += query * shapes.products("linear_proj") / shapes.size  # what comes out, once more in one piece
    return shapes.tokens * numbers * shapes.size + sums


def gathered_attention(shapes: Shapes, query: float) -> float:
    """Context parallelism's on a CPU: keys and values of all ranks, repeated for all heads, and a mask in fp32.

    A rank has two of 2 * ranks chunks, which look at 2 * ranks + 1 chunks in all.
    """
    chunks, work = 2 * shapes.layout.context, shapes.work
    seen = shapes.tokens / 2 * (chunks + 1)
    mask = FP32_BYTES * (chunks + 1) * work.squared_lengths / chunks**2 / (1 if work.packed else work.samples)
    return (3 * shapes.tokens + 2 * seen) * query * shapes.size + mask


def sent(shapes: Shapes) -> float:
    """Tokens that a rank's experts get, each once for every expert, where they are spread evenly."""
    return shapes.split * shapes.run.model.moe_router_topk * shapes.layout.expert_tensor


def experts(shapes: Shapes) -> float:
    """Bytes of a layer's experts.

    One by one they are Megatron's: silu, its product, and that weighted by the router are kept beside fc1's output.
    """
    model, ranks = shapes.run.model, shapes.layout.expert_tensor
    copies = 1 + (ranks > 1)  # what is gathered is sorted once more
    width = (3 if shapes.engine else 6) * (model.moe_ffn_hidden_size or 0) / ranks
    return sent(shapes) * (copies * model.hidden_size + width) * shapes.size


def embedding(shapes: Shapes) -> Part:
    """Word embeddings, with features at the placeholders and those of DeepStack behind them."""
    model = shapes.run.model
    wide = shapes.work.positions * model.hidden_size * (1 + model.deepstack_layers) * shapes.size
    return Part("embedding", wide if model.deepstack_layers else 0.0, wide, wide)


def output(shapes: Shapes) -> Part:
    """The hidden states that have a label, the gradients of these and of the weight, and a chunk's logits.

    Chunks add to the weight's gradient in fp32, what one of them has and in the end all of it beside that in the run's
    precision.
    """
    model, size = shapes.run.model, shapes.size
    labelled = shapes.work.trained_tokens / shapes.layout.context
    vocabulary = padded_vocab_size(model, shapes.layout.tensor) / shapes.layout.tensor
    chunk = min(labelled, CHUNK if shapes.engine else CHUNK_ON_CPU)
    logits = chunk * vocabulary * (size if size == FP32_BYTES else size + FP32_BYTES)
    weight = vocabulary * model.hidden_size * shapes.trains(LANGUAGE)
    apart = size < FP32_BYTES and chunk < labelled
    gradients = labelled * model.hidden_size * size + weight * (FP32_BYTES if apart else size)
    picked, gathered = labelled * model.hidden_size * size, shapes.tokens * model.hidden_size * size
    product = weight * size * apart
    return Part("output", gradients, logits + picked + product, max(gathered, product))


def seeing(shapes: Shapes) -> list[Part]:
    """The vision tower and the projector. What is frozen, above nothing that trains, keeps nothing."""
    model: Any = shapes.run.model
    vision = model.mm_cfg.vision_encoder
    shape = tower_shape(shapes.run)
    flows, work = shapes.trains(TOWER), shapes.work
    tokens = work.patches + work.views * shape.class_token
    layer = tower_layer(shapes, shape, tokens)
    pixels = work.patches * vision.patch_values
    passed = tokens * shape.hidden_size * shapes.size
    if flows:
        tower = recomputed(shapes, layer, vision.depth, passed)
        tower = replace(tower, kept=tower.kept + passed * (2 + len(shape.taps)) + pixels * shapes.size)
    else:
        tower = replace(layer, kept=0.0)
    return [tower, projector(shapes, flows)]


def tower_layer(shapes: Shapes, shape: VisionShape, tokens: int) -> Part:
    """Two sums, the norms behind them, attention and an FFN of two matrices, all with biases."""
    tensor, width, ffn = shape.split(shapes.layout.tensor), shape.hidden_size, shape.ffn_hidden_size
    rotated = 2 * width * FP32_BYTES / shapes.size if shape.merge_size and shapes.engine else 0.0
    activated = 3 if shape.activation == "quick_gelu" else 2
    numbers = 4 * width + (4 * width + rotated + activated * ffn) / tensor
    kept = tokens * (numbers * shapes.size + FP32_BYTES * shape.num_attention_heads / tensor)
    working = tokens * shapes.size * (2 * width + 2 * ffn / tensor)
    return Part("vision_model", kept, working, working)


def projector(shapes: Shapes, flows: bool) -> Part:
    """What its linear layers and GELU take, a norm makes, and for DeepStack is cut out of the tower's features."""
    model: Any = shapes.run.model
    mm, out = model.mm_cfg, model.hidden_size
    merges = shapes.work.patches // max(shapes.work.visual_tokens, 1) > 1
    into = shapes.work.visual_tokens * mm.projector_input_size * shapes.size
    passed = shapes.work.visual_tokens * out * shapes.size * (1 + model.deepstack_layers)
    inner = 2 / shapes.layout.tensor
    kept = (1 + inner + (2 + inner) * model.deepstack_layers) * into if merges else inner * passed
    if not flows and not shapes.trains(PROJECTOR):
        kept = 0.0
    return Part("vision_projection", kept, passed, passed + into)


def buffers(shapes: Shapes) -> float:
    """Bytes that communication takes: what is on its way between stages, gathered sequences, FSDP's gathered layers."""
    layout, found = shapes.layout, 0.0
    if layout.pipeline > 1:  # virtual stages are sent for in advance
        found += shapes.hidden * (1 if layout.virtual == 1 else 4)
    if layout.sequence_parallel:
        found += shapes.tokens * shapes.run.model.hidden_size * shapes.size
    if layout.fsdp is not None:
        found += gathered_units(shapes)
    return found


def gathered_units(shapes: Shapes) -> float:
    """Bytes of the units that FSDP holds whole at a time (fsdp.shard), and of their gradients in fp32.

    A layer's weights are there twice, the next being gathered beside it; tied embeddings are from the first layer to
    the last, and others a unit of their own.
    """
    model, layout = shapes.run.model, shapes.layout
    gathered, reduced = shapes.size * (layout.fsdp != "grad"), FP32_BYTES * shapes.trains(LANGUAGE)
    layer = layer_weights(shapes) * (2 * gathered + reduced)
    embedding = padded_vocab_size(model, layout.tensor) / layout.tensor * model.hidden_size
    if model.share_embeddings_and_output_weights:
        return layer + embedding * gathered
    return max(layer, embedding * (gathered + reduced))


def layer_weights(shapes: Shapes) -> float:
    """Those of a decoder layer's products on one rank."""
    model, layout = shapes.run.model, shapes.layout
    heads = 2 * (model.num_attention_heads + model.num_query_groups) * model.kv_channels / layout.tensor
    ffn = 3 * model.ffn_hidden_size / layout.tensor
    if model.num_moe_experts:
        ffn = 3 * model.moe_ffn_hidden_size * model.num_moe_experts / (layout.expert * layout.expert_tensor)
    return model.hidden_size * (heads + ffn)
