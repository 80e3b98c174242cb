"""Step times of the plan beside published ones: tokens a second and GPU.

`ours` is what dry_run=true expects of the run on that hardware, `peer` what its source measured. Published runs are of
two kinds. Tuned ones, of vendors' performance tables, are what the plan predicts: they are inside of 25 %, which is a
goal. The others ran as they came (full recomputation, no packing, small batches, another framework's kernels): the plan
says what the same hardware would do for a tuned run, and their ratio is only told. The constants in
nemo_vlm/planning/hardware.py are fitted to the former, by the medians of each kind of hardware and precision; a run in
another precision or layout than all of these is extrapolated. Of the Ascend 910B nothing here is measured, of the A100
nothing that was tuned, of the H200 one run alone: their times stand on data sheets and the H100's shares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from settled import settled
from side_by_side import flags, report, row

from nemo_vlm import layout as layouts
from nemo_vlm.planning import hardware
from nemo_vlm.planning.communication import Case
from nemo_vlm.planning.parameters import count
from nemo_vlm.planning.timing import step_time
from nemo_vlm.planning.workload import workload

BAND = 0.25
NEMO = "NVIDIA/NeMo docs/source/performance/performance_summary.md, 24.07"
BRIDGE = "Megatron-Bridge docs/performance-summary-archive.md, 25.11"
BRIDGE_02 = "Megatron-Bridge docs/performance-summary-archive.md, 26.02"
AUTO = "NeMo AutoModel docs/performance-summary.mdx"
FP8 = "trainer.precision=bf16 model.fp8=true"
LORA = "model.peft.peft_scheme=lora model.peft.lora_tuning.target_modules=[all] model.peft.lora_tuning.adapter_dim=16"
FULL = "model.activations_checkpoint_granularity=full"
SP = "model.sequence_parallel=true model.ub_tp_comm_overlap=true"
NODE = "trainer.devices=8"
LLAVA = 800  # tokens of a sample with its image's 576, about
SQUAD = 200  # tokens of a question of SQuAD with its paragraph and answer, about


def batch(micro: int, whole: int, tokens: int) -> str:
    return f"model.micro_batch_size={micro} model.global_batch_size={whole} model.encoder_seq_length={tokens}"


def sizes(**given: int) -> str:
    """tp=4, pp=8, vp=5 and the like as overrides."""
    keys = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vp": "virtual_pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
    }
    return " ".join(f"model.{keys[short]}={value}" for short, value in given.items())


@dataclass(frozen=True)
class Published:
    """A run that somebody measured.

    Attributes:
        settings: overrides of gpt_pretrain that describe it.
        tokens: a second and GPU.
        packed: length of the samples that fill each row; None: one sample a row.
        images: in a sample; None: as the plan estimates.
        tuned: it is claimed to be inside of the band.
    """

    name: str
    settings: str
    tokens: float
    source: str
    packed: int | None = None
    images: int | None = None
    tuned: bool = True
    hardware: str = "h100"
    recipe: str = "gpt_pretrain"


RUNS = (
    Published("Llama2-7B fp8", f"model=llama2_7b {NODE} {FP8} {batch(1, 128, 4096)}", 16847, NEMO),
    Published(
        "Llama2-13B fp8 PP4 VP10",
        f"model=llama2_13b {NODE} trainer.num_nodes=2 {FP8} {batch(1, 128, 4096)} {sizes(pp=4, vp=10)}",
        8646,
        NEMO,
    ),
    Published(
        "Llama2-70B fp8 TP4 PP4 VP20",
        f"model=llama2_70b {NODE} trainer.num_nodes=8 {FP8} {batch(1, 128, 4096)} {SP} {sizes(tp=4, pp=4, vp=20)}",
        1707,
        NEMO,
    ),
    Published("Llama3-8B fp8 CP2", f"model=llama3_8b {NODE} {FP8} {batch(1, 128, 8192)} {sizes(cp=2)}", 12036, NEMO),
    Published(
        "Llama3-70B fp8 TP4 PP4 CP2 VP5",
        f"model=llama3_70b {NODE} trainer.num_nodes=8 {FP8} {batch(1, 128, 8192)} {SP} {sizes(tp=4, pp=4, cp=2, vp=5)}",
        1533,
        NEMO,
    ),
    Published("Llama2-7B SFT fp8", f"model=llama2_7b {NODE} {FP8} {batch(1, 32, 4096)}", 17120, NEMO, packed=SQUAD),
    Published(  # virtual stages as when it is pretrained; the table does not tell
        "Llama2-13B SFT fp8 PP4 VP10",
        f"model=llama2_13b {NODE} {FP8} {batch(1, 32, 4096)} {sizes(pp=4, vp=10)}",
        9741,
        NEMO,
        packed=SQUAD,
    ),
    Published(
        "Llama2-70B SFT fp8 TP4 PP4 VP20",
        f"model=llama2_70b {NODE} trainer.num_nodes=2 {FP8} {batch(1, 32, 4096)} {SP} {sizes(tp=4, pp=4, vp=20)}",
        1833,
        NEMO,
        packed=SQUAD,
    ),
    Published(
        "Llama2-7B LoRA fp8", f"model=llama2_7b {NODE} {FP8} {LORA} {batch(1, 32, 4096)}", 25206, NEMO, packed=SQUAD
    ),
    Published(
        "Llama2-13B LoRA fp8", f"model=llama2_13b {NODE} {FP8} {LORA} {batch(1, 32, 4096)}", 14161, NEMO, packed=SQUAD
    ),
    Published(
        "Llama2-70B LoRA fp8 TP2 PP4 VP20",
        f"model=llama2_70b {NODE} {FP8} {LORA} {batch(1, 32, 4096)} {SP} {sizes(tp=2, pp=4, vp=20)}",
        2557,
        NEMO,
        packed=SQUAD,
    ),
    Published(
        "Llama3-8B fp8 FSDP", f"model=llama3_8b {NODE} {FP8} {batch(1, 128, 8192)} model.fsdp=true", 14451, BRIDGE
    ),
    Published(
        "Llama3-70B fp8 TP4 PP8 VP5",
        f"model=llama3_70b {NODE} trainer.num_nodes=8 {FP8} {batch(1, 128, 8192)} {SP} {sizes(tp=4, pp=8, vp=5)}",
        1602,
        BRIDGE,
    ),
    Published(
        "Llama3.1-405B fp8 TP8 PP8 CP2 VP8, 1024 GPUs",
        f"model=llama3_70b model.num_layers=126 model.hidden_size=16384 model.ffn_hidden_size=53248 "
        f"model.num_attention_heads=128 {NODE} trainer.num_nodes=128 {FP8} {batch(1, 1536, 8192)} {SP} "
        f"{sizes(tp=8, pp=8, cp=2, vp=8)}",
        311,
        BRIDGE_02,
    ),
    Published(
        "Llama3-8B fp8, B200", f"model=llama3_8b {NODE} {FP8} {batch(2, 128, 8192)}", 30624, BRIDGE, hardware="b200"
    ),
    Published(
        "Llama3.1-405B fp8 TP4 PP8 CP2 VP8, B200",
        f"model=llama3_70b model.num_layers=126 model.hidden_size=16384 model.ffn_hidden_size=53248 "
        f"model.num_attention_heads=128 {NODE} trainer.num_nodes=16 {FP8} {batch(1, 64, 8192)} {SP} "
        f"{sizes(tp=4, pp=8, cp=2, vp=8)}",
        661,
        BRIDGE,
        hardware="b200",
    ),
    Published(
        "Qwen3-8B bf16",
        f"model=qwen3_8b {NODE} trainer.num_nodes=2 trainer.precision=bf16 {batch(1, 1024, 4096)}",
        10456,
        "Megatron-Bridge model_verification_cards/qwen3-8b",
    ),
    Published(
        "Llama3-70B bf16 FSDP CP2, recomputed",
        f"model=llama3_70b {NODE} trainer.num_nodes=8 trainer.precision=bf16 {batch(1, 128, 8192)} "
        f"model.fsdp=true {sizes(cp=2)} {FULL}",
        867,
        AUTO,
    ),
    Published(
        "Llama3-8B LoRA bf16",
        f"model=llama3_8b trainer.devices=1 trainer.precision=bf16 {LORA} {batch(2, 32, 4096)}",
        12473,
        AUTO,
    ),
    Published(
        "Qwen2.5-7B LoRA bf16",
        f"model=qwen2_5_7b trainer.devices=1 trainer.precision=bf16 {LORA} {batch(2, 32, 4096)}",
        14110,
        AUTO,
    ),
    Published(
        "Qwen2.5-32B LoRA bf16 FSDP TP2, recomputed",
        f"model=qwen2_5_32b {NODE} trainer.precision=bf16 {LORA} {batch(2, 32, 4096)} model.fsdp=true {FULL} "
        f"{sizes(tp=2)}",
        2250,
        AUTO,
    ),
    Published(
        "Llama3-70B LoRA bf16 FSDP TP2, recomputed",
        f"model=llama3_70b {NODE} trainer.precision=bf16 {LORA} {batch(2, 32, 4096)} model.fsdp=true {FULL} "
        f"{sizes(tp=2)}",
        1092,
        AUTO,
    ),
    Published(
        "Qwen3-30B-A3B bf16 EP8",
        f"model=qwen3_vl_30b_a3b {NODE} trainer.num_nodes=2 trainer.precision=bf16 {batch(4, 1024, 4096)} "
        f"{sizes(ep=8, etp=1)}",
        13011,
        "Megatron-Bridge model_verification_cards/qwen3-30b-a3b, forced balance",
        recipe="qwen3_vl_finetune",
        images=0,
    ),
    Published(
        "Qwen3-30B-A3B bf16 EP8, recomputed",
        f"model=qwen3_vl_30b_a3b {NODE} trainer.precision=bf16 {batch(4, 512, 4096)} {FULL} {sizes(ep=8, etp=1)}",
        12040,
        AUTO,
        recipe="qwen3_vl_finetune",
        images=0,
    ),
    Published(
        "LLaVA-1.5-7B stage 1, A100",
        f"model=llava_7b {NODE} trainer.precision=bf16 {batch(32, 256, LLAVA)} model.mm_cfg.llm.freeze=true "
        f"model.mm_cfg.vision_encoder.freeze=true {FULL}",
        5.5 * LLAVA,
        "LLaVA v1.5 README: 5.5 samples/s/GPU, DeepSpeed ZeRO-2",
        tuned=False,
        hardware="a100",
        recipe="neva_finetune",
    ),
    Published(
        "LLaVA-1.5-7B stage 2, A100",
        f"model=llava_7b {NODE} trainer.precision=bf16 {batch(16, 128, LLAVA)} model.mm_cfg.vision_encoder.freeze=true "
        f"model.fsdp=true {FULL}",
        2.3 * LLAVA,
        "LLaVA v1.5 README: 2.3 samples/s/GPU, DeepSpeed ZeRO-3",
        tuned=False,
        hardware="a100",
        recipe="neva_finetune",
    ),
    Published(
        "Qwen2.5-14B SFT 8k packed TP8, A100",
        f"model=qwen2_5_14b {NODE} trainer.precision=bf16 {batch(1, 16, 8192)} {SP} {sizes(tp=8)} {FULL}",
        1812,
        "ms-swift Megatron-SWIFT/Quick-start.md: 9.04 s/it on 8 A800, layout and batch not told",
        packed=1000,
        tuned=False,
        hardware="a100",
    ),
    Published(
        "Qwen3-30B-A3B SFT 8k PP2 EP8 recomputed, A100",
        f"model=qwen3_vl_30b_a3b {NODE} trainer.num_nodes=2 trainer.precision=bf16 {batch(1, 16, 8192)} {FULL} "
        f"{sizes(pp=2, ep=8, etp=1)}",
        853,
        "ms-swift Megatron-SWIFT/Quick-start.md: 9.6 s/it on 16 A800",
        tuned=False,
        hardware="a100",
        recipe="qwen3_vl_finetune",
        images=0,
    ),
    Published(
        "Llama3.1-8B bf16 FSDP, 500 W",
        f"model=llama3_8b {NODE} trainer.precision=bf16 {batch(1, 8, 8192)} model.fsdp=true",
        6667,
        "torchtitan benchmarks/llama3_h100_202412_torchtitan.md",
        tuned=False,
    ),
    Published(
        "Qwen3-8B SFT bf16 2k, 4 GPUs",
        f"model=qwen3_8b trainer.devices=4 trainer.precision=bf16 {batch(1, 4, 2048)} {sizes(tp=4)} {FULL} "
        "model.sequence_parallel=true",
        2207,
        "Megatron-Bridge model_verification_cards/qwen3-8b",
        tuned=False,
    ),
    Published(
        "Llama3.1-8B fp8 FSDP, 500 W",
        f"model=llama3_8b {NODE} {FP8} {batch(1, 8, 8192)} model.fsdp=true",
        8532,
        "torchtitan benchmarks/llama3_h100_202412_torchtitan.md",
        tuned=False,
    ),
    Published(  # the batch is not told: one sample a rank
        "Llama3.1-8B fp8 FSDP, 32 H200",
        f"model=llama3_8b {NODE} trainer.num_nodes=4 {FP8} {batch(1, 32, 8192)} model.fsdp=true",
        10938,
        "torchtitan benchmarks/llama3-8b_h200_202506",
        tuned=False,
        hardware="h200",
    ),
    *(
        Published(  # a sequence a group of ranks
            f"Qwen2-VL-72B-sized {tokens // 1024}k FSDP CP{parts}, 128 GPUs",
            f"model=qwen2_vl_72b {NODE} trainer.num_nodes=16 trainer.precision=bf16 "
            f"{batch(1, 128 // parts, tokens)} model.fsdp=true {FULL} {sizes(cp=parts)}",
            speed,
            "VeOmni docs/assets/performance.png, size and GPU inferred",
            tuned=False,
            recipe="qwen2_vl_finetune",
            images=0,
        )
        for tokens, parts, speed in (
            (8192, 4, 565),
            (16384, 4, 624),
            (32768, 4, 592),
            (65536, 4, 468),
            (131072, 8, 303),
        )
    ),
)


def planned(published: Published) -> float:
    """Tokens a second and GPU."""
    run = settled(published.recipe, published.settings)
    layout = layouts.resolve(run, 0, {})
    work = workload(run, layout, None, published.images)
    if published.packed is not None:
        work = replace(work, squared_lengths=work.tokens * published.packed)
    case = Case(run, layout, work, work, hardware.named(published.hardware))
    return step_time(case, count(run, layout.tensor).heaviest(layout)).tokens_per_sec / layout.world_size


def rows() -> Iterator[dict[str, Any]]:
    for published in RUNS:
        goal = f"+-{BAND}" if published.tuned else ""
        yield row(published.name, planned(published), published.tokens, "tok/s/GPU", goal)


def main() -> None:
    arguments = flags(__doc__, rounds=None).parse_args()
    report(rows(), arguments.json)


if __name__ == "__main__":
    main()
