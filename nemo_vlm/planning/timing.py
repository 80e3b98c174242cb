"""How long a step takes on named hardware: products, memory traffic, communication, the pipeline's schedule.

The model is a roofline added up: a product with weights takes its operations at the rate that large products reach
(hardware.Hardware.products, fitted to published runs by scripts/benchmarks/plan_times.py) and its operands' way through
memory; norms, rotations, activations and residuals take their traffic. What runs beside something else counts as far as
it is longer: gradients and weights of data parallelism beside one micro-batch's backward and forward pass, where they
overlap; those of FSDP beside each; keys and values of context parallelism beside attention; the backward half of tensor
parallelism beside the weights' gradients. The rest of communication waits. It is a well-tuned run that is predicted:
data never wait, and kernels are fused where Transformer Engine fuses them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nemo_vlm.planning import communication
from nemo_vlm.planning.communication import Case
from nemo_vlm.planning.flops import ffn_weights, forward_flops, passes
from nemo_vlm.planning.footprints import engine, tower_shape
from nemo_vlm.planning.parameters import Count
from nemo_vlm.planning.schedule import Stages, bubble, length

HBM_SHARE = 0.8  # of its bandwidth that plain kernels reach
NETWORK_SHARE = 0.8  # the same of links and networks
FP32_SHARE = 1 / 15  # of the bf16 peak, outside of tensor cores
LATENCY = 20e-6  # seconds of a collective
HOP = 4e-6  # seconds more for each further rank of a ring
SLOWED = 0.1  # of what runs beside products, by which these take longer
LAUNCH = 1e-4  # seconds that the host needs for a layer's kernels
STATE_TRAFFIC = 30  # bytes that the optimizer reads and writes a parameter: gradient, main weight, moments, weight
HIDDEN_TRAFFIC, FFN_TRAFFIC = 13, 3  # values that a layer reads and writes a token, in units of its widths
LOGIT_TRAFFIC = 16  # bytes read and written a logit, forward and backward
ROUTED_TRAFFIC = 4  # times that a routed token is read and written on its way through the experts
CAST_TRAFFIC = 4  # bytes a value of an operand that becomes 8 bits, in both layouts


@dataclass(frozen=True)
class Pass:
    """Seconds of a part's forward and backward pass."""

    forward: float
    backward: float

    def plus(self, other: Pass) -> Pass:
        return Pass(self.forward + other.forward, self.backward + other.backward)

    def times(self, count: float) -> Pass:
        return Pass(count * self.forward, count * self.backward)

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class StepTime:
    """A step.

    Attributes:
        bubble: share of the pipeline's time in which a rank waits, on average.
        exposed: seconds of gradients and weights on their way that nothing hides.
        optimizer: seconds of the update.
        flops: of the model, on all ranks.
        mfu: those over the bf16 peak.
        hfu: the same of what is really computed.
    """

    seconds: float
    bubble: float
    exposed: float
    optimizer: float
    flops: float
    mfu: float
    hfu: float
    tokens_per_sec: float
    stages: Stages


def rate(case: Case, eight_bits: bool = False) -> float:
    """FLOPs a second of large products."""
    hardware, (bf16, fp8) = case.hardware, case.hardware.products
    if case.run.trainer.precision == "32":
        return 1e12 * hardware.bf16_tflops * FP32_SHARE
    if eight_bits and hardware.fp8_tflops is not None:
        return 1e12 * hardware.fp8_tflops * fp8
    return 1e12 * hardware.bf16_tflops * bf16


def traffic(case: Case, num_bytes: float) -> float:
    return num_bytes / (case.hardware.hbm * HBM_SHARE)


def product(case: Case, rows: float, inner: float, outer: float, copies: int = 1) -> float:
    """Seconds of [rows, inner] x [inner, outer]; `copies` of the weight share the rows."""
    eight_bits = case.run.step.fp8
    operands = rows * inner + copies * inner * outer + rows * outer
    cast = CAST_TRAFFIC * rows * inner * eight_bits
    return 2 * rows * inner * outer / rate(case, eight_bits) + traffic(case, case.size * operands + cast)


def attend(case: Case, flops: float) -> float:
    fp32 = case.run.trainer.precision == "32"
    return flops / (1e12 * case.hardware.bf16_tflops * (FP32_SHARE if fp32 else case.hardware.attention))


def decoder_products(case: Case) -> float:
    """Seconds of a layer's products with weights, forward."""
    model, tensor, tokens = case.run.model, case.layout.tensor, case.tokens
    heads, groups, size = model.num_attention_heads, model.num_query_groups, model.kv_channels
    width = heads * size / tensor  # type: ignore[operator]
    keys = 2 * max(groups / tensor, 1) * size  # type: ignore[operator]
    projections = product(case, tokens, model.hidden_size, width + keys) + product(
        case, tokens, width, model.hidden_size
    )
    return projections + ffn_products(case)


def ffn_products(case: Case) -> float:
    model, layout, hidden = case.run.model, case.layout, case.run.model.hidden_size
    if model.num_moe_experts is None:
        inner = model.ffn_hidden_size / layout.tensor
        return product(case, case.tokens, hidden, 2 * inner) + product(case, case.tokens, inner, hidden)
    rows, inner = routed(case) * layout.expert_tensor, model.moe_ffn_hidden_size / layout.expert_tensor  # type: ignore[operator]
    copies = model.num_moe_experts // layout.expert
    own = product(case, case.own_tokens, hidden, model.num_moe_experts)
    return own + product(case, rows, hidden, 2 * inner, copies) + product(case, rows, inner, hidden, copies)


def routed(case: Case) -> float:
    """Rows that a rank's experts get, each token once for each of its experts."""
    return case.own_tokens * case.run.model.moe_router_topk


def decoder_traffic(case: Case) -> float:
    """Seconds of what is no product, forward."""
    model, layout = case.run.model, case.layout
    values = case.own_tokens * HIDDEN_TRAFFIC * model.hidden_size + adapter_values(case)
    if model.num_moe_experts is None:
        values += case.tokens * FFN_TRAFFIC * model.ffn_hidden_size / layout.tensor
    else:
        rows = routed(case)
        values += rows * (ROUTED_TRAFFIC * model.hidden_size + FFN_TRAFFIC * model.moe_ffn_hidden_size)  # type: ignore[operator]
    return traffic(case, case.size * values)


def adapter_values(case: Case) -> float:
    """Read and written beside the linear layers that have adapters: their inputs, and twice their outputs."""
    model, lora, tensor = case.run.model, case.run.peft.lora, case.layout.tensor
    if lora is None:
        return 0.0
    hidden, ffn, size = model.hidden_size, model.ffn_hidden_size / tensor, model.kv_channels
    heads, groups = model.num_attention_heads, model.num_query_groups
    widths = {
        "linear_qkv": (hidden, size * (heads + 2 * groups) / tensor),  # type: ignore[operator]
        "linear_proj": (size * heads / tensor, hidden),  # type: ignore[operator]
        "linear_fc1": (hidden, 2 * ffn),
        "linear_fc2": (ffn, hidden),
    }
    return case.tokens * sum(inner + 2 * outer for name, (inner, outer) in widths.items() if name in lora.linears)


def send(num_bytes: float, speed: float, count: int = 1) -> float:
    """Seconds of `count` collectives; nothing where a rank is alone."""
    return num_bytes / (speed * NETWORK_SHARE) + count * LATENCY if num_bytes else 0.0


def tensor_messages(case: Case, sent: communication.Passes, count: int) -> Pass:
    """So many collectives of tensor parallelism each way, of so many bytes together."""
    return Pass(*(send(num_bytes, communication.tensor_speed(case), count) for num_bytes in sent))


def decoder_layer(case: Case) -> Pass:
    """One layer, one micro-batch, on one rank; what it recomputes counts backward."""
    model, layout, step = case.run.model, case.layout, case.run.step
    work = forward_flops(model, 0, case.work.squared_lengths, 0, 0)["attention"]
    core = attend(case, work / model.num_layers / layout.tensor / layout.context)
    matmul, plain = decoder_products(case), decoder_traffic(case)
    volumes = communication.of_layer(case)
    tensor, ring, expert = (
        Pass(*(send(num_bytes, speed, count) for num_bytes in volumes[kind]))
        for kind, speed, count in (
            ("tensor", communication.tensor_speed(case), 4),
            ("context", communication.context_speed(case), layout.context - 1),
            ("expert", communication.expert_speed(case), 2),
        )
    )
    share = 0.2 if step.ub_tp_comm_overlap else 1.0
    weights = passes(model, case.run.peft.lora is not None)["decoder"] - 2  # whether their gradients are computed
    forward_ring, backward_ring = exposed_ring(case, ring, core)
    waits = tensor.forward * share + forward_ring + expert.forward
    forward = max(matmul + plain + core, LAUNCH) + waits
    beside = max(tensor.backward * share - weights * matmul / 2, tensor.backward * share / 2)
    backward = max(matmul * (1 + weights) + 2 * plain + 2.5 * core, 2 * LAUNCH) + beside
    backward += backward_ring + expert.backward
    if step.activations_checkpoint_granularity == "selective":
        backward += core + forward_ring
    return Pass(forward, backward)


def exposed_ring(case: Case, ring: Pass, core: float) -> tuple[float, float]:
    """Seconds that context parallelism adds to a layer's passes.

    Keys and values go round beside attention, but each step on its way starts by itself; those that are gathered, by
    our own kernels, wait until all have come.
    """
    if not engine(case.run):
        return ring.forward, ring.backward
    starts = (case.layout.context - 1) * LATENCY
    return max(ring.forward - core, starts), max(ring.backward - 2.5 * core, starts)


def tower(case: Case) -> Pass:
    """The vision tower and projector, on the first stage; every context-parallel rank runs them whole."""
    model, work, media = case.run.model, case.work, case.run.model.media
    if media is None or not work.patches:
        return Pass(0.0, 0.0)
    vision = media.vision_encoder
    whole = forward_flops(model, 0, 0, work.patches, work.squared_frames)
    linear = forward_flops(model, 0, 0, work.patches, 0)
    hidden, ffn, depth = vision.hidden_size, vision.ffn_hidden_size, vision.num_layers  # type: ignore[attr-defined]
    split = tower_shape(case.run).split(case.layout.tensor)
    values = depth * work.patches * (HIDDEN_TRAFFIC * hidden + FFN_TRAFFIC * ffn / split)
    plain = traffic(case, case.size * values)
    core = attend(case, (whole["vision"] - linear["vision"]) / split)
    matmul, projector = linear["vision"] / split / rate(case), linear["projector"] / split / rate(case)
    count = passes(model, case.run.peft.lora is not None)
    trained, through = count["vision"] == 3, count["projector"] - 1
    sums = tensor_messages(case, communication.tower(case), 2 * depth)
    forward = max(matmul + core + plain, depth * LAUNCH) + sums.forward
    backward = trained * max(2 * matmul + 2.5 * core + 2 * plain, 2 * depth * LAUNCH) + sums.backward
    if trained:
        backward += forward * case.recomputed(depth) / depth
    return Pass(forward + projector, backward + through * projector)


def output(case: Case) -> Pass:
    """Logits and loss of the labelled positions, on the last stage."""
    model, labelled = case.run.model, case.work.trained_tokens / case.layout.context
    share = (model.vocab_size or 0) / case.layout.tensor
    flops = 2 * labelled * model.hidden_size * share
    count = passes(model, case.run.peft.lora is not None)["output"]
    seconds = flops / rate(case)
    plain = traffic(case, LOGIT_TRAFFIC * labelled * share)
    return Pass(seconds + plain / 2, (count - 1) * seconds + plain / 2)


def left_out(case: Case) -> tuple[float, int]:
    """The share of positions that the last layer's MLP is spared, and how often its products would have been taken."""
    share, again = communication.unlabelled(case)
    return share, passes(case.run.model, case.run.peft.lora is not None)["decoder"] + again


def spared(case: Case) -> Pass:
    """Products and messages of the last layer's MLP at positions without a label."""
    share, times = left_out(case)
    if not share:
        return Pass(0.0, 0.0)
    seconds = share * ffn_products(case)
    return Pass(seconds, (times - 1) * seconds).plus(tensor_messages(case, communication.spared(case), 0))


def stage_times(case: Case) -> Stages:
    """Seconds of each stage for a micro-batch, with its messages where they do not run beside the computation."""
    layout, layer = case.layout, decoder_layer(case)
    message = send(communication.boundary(case), communication.pipeline_speed(case)) if layout.virtual == 1 else 0.0
    by_layers = {
        layers: layer.times(layers).plus(Pass(message, message + layer.forward * case.recomputed(layers)))
        for layers in set(layout.stage_layers)
    }
    found = [by_layers[layers] for layers in layout.stage_layers]
    first, last = (tensor_messages(case, sent, 1) for sent in communication.ends(case))
    found[0] = found[0].plus(tower(case)).plus(first)
    found[-1] = found[-1].plus(output(case)).plus(last).plus(spared(case).times(-1))
    return Stages(tuple(s.forward for s in found), tuple(s.backward for s in found), layout.pipeline)


def with_fsdp(case: Case, stages: Stages, count: Count) -> Stages:
    """A pass is as long as what is gathered and scattered for it, where that is longer; where not, it is slowed."""
    (gradients, (first, again), copies), layout = communication.of_fsdp(case, count), case.layout
    speed, units = communication.shard_speed(case), case.run.model.num_layers
    hops = units * HOP * (layout.shards - 1)
    back = send(gradients + again, speed, 2 * units) + send(copies, communication.copy_speed(case), units)
    needed = (send(first, speed, units) + hops, back + 2 * hops)
    pairs = zip((stages.forward[0], stages.backward[0]), needed, strict=True)
    forward, backward = (max(pair) + SLOWED * min(pair) for pair in pairs)
    return Stages((forward,), (backward,), 1)


def update_times(case: Case, stages: Stages, count: Count) -> tuple[float, float]:
    """Seconds of gradients and weights that nothing hides, and of the optimizer."""
    layout = case.layout
    if layout.fsdp is not None:
        trained = count.trained + count.trained_experts
        return 0.0, traffic(case, STATE_TRAFFIC * trained / layout.shards)
    gradients, weights = (
        send(others, communication.replica_speed(case)) + send(experts, communication.expert_data_speed(case))
        for others, experts in communication.of_update(case, count)
    )
    beside_gradients, beside_weights = case.overlap
    waits = max(gradients - beside_gradients * max(stages.backward), 0.0)
    waits += max(weights - beside_weights * max(stages.forward), 0.0)
    waits += send(communication.tied(case), communication.pipeline_speed(case))
    of_others, of_experts = case.run.optim.sharing(layout, case.run.trainer.precision)
    return waits, traffic(case, STATE_TRAFFIC * (count.trained / of_others + count.trained_experts / of_experts))


def step_time(case: Case, count: Count, schedule: Callable[[Stages, int], float] = length) -> StepTime:
    """A step of the run.

    Args:
        count: of the rank that trains most.
        schedule: seconds of the pipeline's schedule; schedule.estimated_length is quicker.
    """
    layout, work = case.layout, case.work
    stages, times = stage_times(case), case.num_micro_batches
    if layout.fsdp is not None:
        stages = with_fsdp(case, stages, count)
    computing = schedule(stages, times)
    exposed, optimizer = update_times(case, stages, count)
    seconds, batch = computing + exposed + optimizer, case.in_all
    flops = batch * sum(step_flops(case).values())
    peak = layout.world_size * 1e12 * case.hardware.bf16_tflops
    return StepTime(
        seconds=seconds,
        bubble=bubble(stages, times, computing),
        exposed=exposed,
        optimizer=optimizer,
        flops=flops,
        mfu=flops / seconds / peak,
        hfu=batch * computed_flops(case) / seconds / peak,
        tokens_per_sec=batch * work.tokens / seconds,
        stages=stages,
    )


def step_flops(case: Case) -> dict[str, float]:
    """Of a micro-batch by part, forward and backward, as MFU counts them (planning.flops)."""
    work, times = case.work, passes(case.run.model, case.run.peft.lora is not None)
    forward = forward_flops(case.run.model, work.tokens, work.squared_lengths, work.patches, work.squared_frames)
    return {part: flops * times[part] for part, flops in forward.items()}


def computed_flops(case: Case) -> float:
    """Of a micro-batch with padding and what is recomputed; output and the last MLP only where labels are."""
    work, layout, model = case.work, case.layout, case.run.model
    needed = step_flops(case)
    again = sum(map(case.recomputed, layout.stage_layers)) / model.num_layers
    selective = case.run.step.activations_checkpoint_granularity == "selective"
    times = passes(model, case.run.peft.lora is not None)
    decoder = needed["decoder"] * (1 + again / times["decoder"]) * work.positions / work.tokens
    share, taken = left_out(case)
    decoder -= share * taken * 2 * work.positions * ffn_weights(model)
    attention = needed["attention"] * (1 + max(again, float(selective)) / times["attention"])
    tower = needed["vision"] * (1 + (again > 0 and times["vision"] == 3) / times["vision"])
    output = needed["output"] * work.trained_tokens / work.tokens
    return decoder + attention + tower + output + needed["projector"]
