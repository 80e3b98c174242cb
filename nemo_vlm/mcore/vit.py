"""A vision transformer from Megatron layers: CLIP, SigLIP, Qwen's, and what differs from them by a few switches."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemo_vlm.batch import Images
from nemo_vlm.config import StepConfig
from nemo_vlm.mcore.config import ACTIVATIONS, BuildContext, encoder_config
from nemo_vlm.mcore.groups import without_tensor_parallel
from nemo_vlm.mcore.layers import layer_spec, norm_class
from nemo_vlm.mcore.mlp import ShardedList
from nemo_vlm.mcore.packed import packed_sequences
from nemo_vlm.mcore.rotary import block_by_block, grid_angles, turns

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VisionShape:
    """What distinguishes one vision transformer from another."""

    patch_size: int
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    activation: str
    layernorm_epsilon: float
    temporal_patch_size: int | None = None  # Qwen's patches reach over so many frames
    merge_size: int | None = None  # Qwen's patches come in blocks of so many along an edge, with rotary positions
    table_size: int | None = None  # learned positions of a square view
    taps: tuple[int, ...] = ()  # layers whose outputs are wanted beside the last one's (Qwen3-VL's DeepStack)
    class_token: bool = False  # CLIP puts a class token in front
    pre_norm: bool = False  # CLIP normalises the embeddings
    post_norm: bool = False  # CLIP and SigLIP have a norm behind the last layer
    patch_bias: bool = False  # SigLIP's and Qwen3-VL's patch convolution has a bias
    pooling_head: bool = False  # SigLIP's, behind all that runs here

    def split(self, tensor: int) -> int:
        """Of so many tensor-parallel ranks, those that share it; 1 where it does not divide: each holds it whole."""
        divides = self.num_attention_heads % tensor == 0 and self.ffn_hidden_size % tensor == 0
        return tensor if divides else 1


class VisionTransformer(MegatronModule):
    """Images to the hidden states of one layer, or of several; parts are named as in Megatron's CLIPViTModel.

    Args:
        depth: layers that run. The others, and what stands behind the last, are only carried along for export.
    """

    READ = ("conv1.", "position_embeddings.")  # modules that are not called, but whose weights are read

    def __init__(self, shape: VisionShape, depth: int, build: BuildContext) -> None:
        tp = build.layout.tensor
        split = shape.split(tp) == tp
        config = vision_config(shape, build, split)
        super().__init__(config)
        self.depth, self.step = depth, build.step
        self.shape = shape
        groups = ProcessGroupCollection.use_mpu_process_groups() if split else without_tensor_parallel()
        self.tp_group = groups.tp
        norm, hidden = norm_class(config, build.kernels), shape.hidden_size
        self.conv1 = patch_convolution(shape)
        if shape.table_size:
            self.position_embeddings = torch.nn.Embedding(shape.table_size + shape.class_token, hidden)
        self.class_token = torch.nn.Parameter(torch.empty(1, 1, hidden)) if shape.class_token else None
        self.ln_pre = norm(config, hidden, shape.layernorm_epsilon) if shape.pre_norm else torch.nn.Identity()
        spec = layer_spec(config, build.kernels, causal=False, own_positions=shape.merge_size is not None)
        layers = [
            build_module(spec, config=config, layer_number=i + 1, pg_collection=groups) for i in range(shape.num_layers)
        ]
        self.layers = ShardedList(layers)
        self.ln_post = norm(config, hidden, shape.layernorm_epsilon) if shape.post_norm else torch.nn.Identity()
        self.head = pooling_head(shape) if shape.pooling_head else torch.nn.Identity()
        for unused in (self.layers[depth:], self.ln_post, self.head):
            unused.requires_grad_(False)
        if not split:
            log.warning(
                "vision tower: %d heads, FFN %d do not divide by %d tensor-parallel ranks: each holds it whole",
                shape.num_attention_heads,
                shape.ffn_hidden_size,
                tp,
            )
            for parameter in self.parameters():  # else clipping counts it once a rank
                parameter.tensor_model_parallel = False

    def forward(self, images: Images) -> Tensor:
        """`features`, for whose backward pass nothing is kept where nothing of the tower is trained."""
        trained = any(parameter.requires_grad for parameter in self.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return self.features(images)

    def features(self, images: Images) -> Tensor:
        """Hidden states [patches, h] of views after `depth` layers, without class tokens, and beside them those of the
        taps: [patches, (1 + taps) h].

        Frames of one size run as a batch, others packed, each seeing only itself.
        """
        frames = [(height, width) for time, height, width in images.grids for _ in range(time)]
        weight, bias = self.conv1.weight, self.conv1.bias
        hidden = images.normalised().pixel_values.to(weight.dtype)  # one name: pixels need not wait for the end
        hidden = F.linear(hidden, weight.flatten(1), bias)  # a convolution's stride
        hidden = self.with_positions(hidden, frames)
        lengths = [height * width + self.shape.class_token for height, width in frames]
        packed, batched = None, len(set(frames)) == 1
        if batched:
            hidden = hidden.unflatten(0, (len(frames), -1)).transpose(0, 1).contiguous()
        else:
            hidden, packed = hidden[:, None], packed_sequences(lengths, hidden.device)
        rotary = self.rotary_turns(frames[:1] if batched else frames)
        hidden, tapped = self.ln_pre(hidden), []
        for start, stop, recompute in recompute_runs(self.depth, self.step):
            if recompute and torch.is_grad_enabled():
                hidden, *found = checkpoint(self.run_layers, start, stop, hidden, rotary, packed, use_reentrant=False)
            else:
                hidden, *found = self.run_layers(start, stop, hidden, rotary, packed)
            tapped += found
        hidden = torch.cat([hidden, *tapped], -1) if tapped else hidden
        hidden = hidden.transpose(0, 1).flatten(0, 1)
        if not self.shape.class_token:
            return hidden
        return torch.cat([frame[1:] for frame in hidden.split(lengths)])

    def blank(self) -> Images:
        """A view of the fewest patches, for a rank that has no image where others may have some."""
        edge, weight = self.shape.merge_size or 1, self.conv1.weight
        pixels = torch.zeros(edge**2, math.prod(weight.shape[1:]), device=weight.device)
        return Images(pixels, torch.tensor([[1, edge, edge]]))

    def rotary_turns(self, frames: list[tuple[int, int]]) -> Tensor | None:
        """Turns [patches, 1, 1, 2 head size] of frames one behind the other; None of a tower with a table alone."""
        merge_size, device = self.shape.merge_size, self.conv1.weight.device
        if merge_size is None:
            return None
        head_size = self.shape.hidden_size // self.shape.num_attention_heads
        known = {size: grid_angles(*size, merge_size, head_size, device) for size in set(frames)}
        return turns(torch.cat([known[size] for size in frames]))[:, None, None]

    def with_positions(self, patches: Tensor, frames: list[tuple[int, int]]) -> Tensor:
        """Patches [n, h] of frames with the class token in front of each, and the position table added."""
        if self.shape.table_size is None:
            return patches
        known = {size: self.table(size) for size in set(frames)}
        if self.class_token is not None:
            split = patches.split([height * width for height, width in frames])
            patches = torch.cat([torch.cat([self.class_token[0], frame]) for frame in split])
        return patches + torch.cat([known[size] for size in frames])

    def table(self, size: tuple[int, int]) -> Tensor:
        """Learned positions [class token + height * width, h] of a frame, in the order of its patches.

        Of another size than the tower's own, they are interpolated, as by HF's interpolate_pos_encoding, and Qwen3-VL's
        fast_pos_embed_interpolate.
        """
        table, merge_size = self.position_embeddings.weight, self.shape.merge_size
        first = 0 if self.class_token is None else 1
        edge = math.isqrt(len(table) - first)
        square = table[first:].unflatten(0, (edge, edge))
        if size != (edge, edge):
            whole = square.permute(2, 0, 1)[None].float()
            mode, corners = ("bicubic", False) if merge_size is None else ("bilinear", True)
            square = F.interpolate(whole, size=size, mode=mode, align_corners=corners)[0].permute(1, 2, 0)
        return torch.cat([table[:first], block_by_block(square, merge_size or 1).to(table.dtype)])

    def run_layers(
        self, start: int, stop: int, hidden: Tensor, rotary: Tensor | None, packed: PackedSeqParams | None
    ) -> list[Tensor]:
        """The output of the last of those layers, and of each that is tapped."""
        tapped = []
        for number in range(start, stop):
            hidden, _ = self.layers[number](
                hidden, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=packed
            )
            if number in self.shape.taps:
                tapped.append(hidden)
        return [hidden, *tapped]


def patch_convolution(shape: VisionShape) -> torch.nn.Conv2d | torch.nn.Conv3d:
    """Over height and width, or over time too."""
    hidden, edge, frames = shape.hidden_size, shape.patch_size, shape.temporal_patch_size
    if frames is None:
        return torch.nn.Conv2d(3, hidden, edge, edge, bias=shape.patch_bias)
    kernel = (frames, edge, edge)
    return torch.nn.Conv3d(3, hidden, kernel, kernel, bias=shape.patch_bias)


def pooling_head(shape: VisionShape) -> torch.nn.Module:
    """The parameters of HF's SiglipMultiheadAttentionPoolingHead, under their names there."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    head = torch.nn.Module()
    head.probe = torch.nn.Parameter(torch.empty(1, 1, hidden))
    head.attention = torch.nn.MultiheadAttention(hidden, shape.num_attention_heads)
    head.layernorm = torch.nn.LayerNorm(hidden)
    head.mlp = torch.nn.ModuleDict({"fc1": torch.nn.Linear(hidden, ffn), "fc2": torch.nn.Linear(ffn, hidden)})
    return head


def recompute_runs(depth: int, step: StepConfig) -> list[tuple[int, int, bool]]:
    """Runs of layers [start, stop) and whether the backward pass recomputes them, as Megatron's TransformerBlock does.

    uniform: all, in runs of activations_checkpoint_num_layers, of which only the inputs are kept; block: the first
    activations_checkpoint_num_layers, each by itself.
    """
    count = step.activations_checkpoint_num_layers
    if step.activations_checkpoint_granularity != "full" or not count:
        return [(0, depth, False)]
    if step.activations_checkpoint_method == "uniform":
        return [(start, min(start + count, depth), True) for start in range(0, depth, count)]
    first = min(count, depth)
    return [*((layer, layer + 1, True) for layer in range(first)), (first, depth, False)]


def vision_config(shape: VisionShape, build: BuildContext, split: bool) -> TransformerConfig:
    return encoder_config(
        build,
        split,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        layernorm_epsilon=shape.layernorm_epsilon,
        add_bias_linear=True,
        add_qkv_bias=True,
        normalization="LayerNorm",
        activation_func=ACTIVATIONS[shape.activation],
    )
