"""Settings: trees to dataclasses, layouts, and what is wrong with them said in one line."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from nemo_vlm.config import DataConfig, LanguageConfig, OptimConfig, ParallelConfig, StepConfig, TrainerConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import (
    check,
    check_model,
    num_micro_batches,
    one_process,
    ranks_per_node,
    resolve,
    stage_layers,
)
from nemo_vlm.models.base import family
from nemo_vlm.models.llava.config import Config
from nemo_vlm.options import check_optimizer
from nemo_vlm.typed import defaults, model_tree, plain_defaults, read_run


def tree(**model):
    from nemo_vlm.config import ExpManagerConfig

    branch = {"family": "llava", **defaults(Config), **model}
    return {
        "trainer": plain_defaults(TrainerConfig),
        "exp_manager": plain_defaults(ExpManagerConfig),
        "model": branch,
    }


def test_defaults_read_back_as_themselves() -> None:
    run = read_run(tree(), Config)
    assert run.model == Config()
    assert run.step == StepConfig()
    again = tree()
    again["model"] = model_tree(run)
    assert read_run(again, Config) == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"optm": {"lr": 1}}, "model.optm: unknown key 'optm'; did you mean 'optim'?"),
        (
            {"optim": {"sched": {"warmup": 3}}},
            "model.optim.sched.warmup: unknown key 'warmup'; did you mean 'warmup_steps'?",
        ),
        ({"micro_batch_size": 2.5}, "model.micro_batch_size=2.5: must be a whole number"),
        ({"micro_batch_size": True}, "model.micro_batch_size=true: must be a whole number"),
        ({"sequence_parallel": 1}, "model.sequence_parallel=1: must be true or false"),
        ({"optim": {"lr": "fast"}}, "model.optim.lr=fast: must be a number"),
        (
            {"optim": {"betas": [0.9]}},
            "model.optim.betas=[0.9]: must be a list of 2 values, each a number",
        ),
        (
            {"loss_reduction": "mean"},
            "model.loss_reduction=mean: must be one of token, sample, micro_batch",
        ),
        (
            {"activations_checkpoint_granularity": True},
            "model.activations_checkpoint_granularity=true: must be full or selective or null",
        ),
        ({"num_attention_heads": 5}, "model.num_attention_heads=5: model.hidden_size=4096 must divide by it"),
        (
            {"activations_checkpoint_method": "block"},
            "model.activations_checkpoint_granularity=null: activations_checkpoint_method and",
        ),
        ({"data": 3}, "model.data=3: a group of settings is expected here"),
        (
            {"mm_cfg": {"vision_encoder": {"num_attention_heads": 5}}},
            "model.mm_cfg.vision_encoder.num_attention_heads=5: hidden_size=1024",
        ),
        (
            {"mm_cfg": {"vision_encoder": {"image_size": 13}}},
            "model.mm_cfg.vision_encoder.image_size=13: must not be below patch_dim=14",
        ),
    ],
)
def test_mistakes_are_named(override, message) -> None:
    with pytest.raises(ConfigError) as error:
        read_run(tree(**override), Config)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_numbers_as_yaml_and_people_write_them() -> None:
    run = read_run(tree(optim={"lr": "1e-3", "betas": [0, "0.5"]}, micro_batch_size=4.0), Config)
    assert (run.optim.lr, run.optim.betas, run.step.micro_batch_size) == (1e-3, (0.0, 0.5), 4)


@pytest.mark.parametrize(
    ("layers", "parallel", "expected"),
    [
        (4, {}, (4,)),
        (4, {"pipeline_model_parallel_size": 2}, (2, 2)),
        (3, {"pipeline_model_parallel_size": 2}, (1, 2)),
        (32, {"pipeline_model_parallel_size": 3}, (10, 11, 11)),
        (10, {"pipeline_model_parallel_size": 4}, (2, 3, 3, 2)),
        (4, {"pipeline_model_parallel_size": 2, "first_pipeline_num_layers": 0}, (0, 4)),
        (4, {"pipeline_model_parallel_size": 2, "pipeline_layers": (3, 1)}, (3, 1)),
        (28, {"pipeline_model_parallel_size": 4, "num_layer_list": (0, 0, 10, 20)}, (0, 10, 10, 8)),
        (28, {"pipeline_model_parallel_size": 4, "pipeline_layers": (0, 10, 10, 8)}, (0, 10, 10, 8)),
        (1, {"pipeline_model_parallel_size": 2}, (0, 1)),
    ],
)
def test_stages(layers: int, parallel: dict, expected: tuple[int, ...]) -> None:
    assert stage_layers(layers, ParallelConfig(**parallel)) == expected


@pytest.mark.parametrize(
    ("layers", "parallel"),
    [
        (4, {"pipeline_model_parallel_size": 2, "pipeline_layers": (3, 2)}),
        (4, {"pipeline_model_parallel_size": 2, "pipeline_layers": (4, 0)}),
        (4, {"pipeline_model_parallel_size": 3, "pipeline_layers": (2, 2)}),
        (4, {"pipeline_model_parallel_size": 2, "first_pipeline_num_layers": 4}),
        (
            4,
            {
                "pipeline_model_parallel_size": 2,
                "first_pipeline_num_layers": 1,
                "pipeline_layers": (2, 2),
            },
        ),
        (2, {"pipeline_model_parallel_size": 4}),
        (28, {"pipeline_model_parallel_size": 4, "num_layer_list": (0, 10, 20)}),
        (28, {"pipeline_model_parallel_size": 3, "num_layer_list": (1, 10, 20)}),
        (28, {"pipeline_model_parallel_size": 3, "num_layer_list": (0, 20, 10)}),
        (28, {"pipeline_model_parallel_size": 3, "num_layer_list": (0, 10, 28)}),
        (4, {"pipeline_model_parallel_size": 2, "num_layer_list": (0, 2), "pipeline_layers": (2, 2)}),
    ],
)
def test_impossible_stages(layers: int, parallel: dict) -> None:
    with pytest.raises(ConfigError):
        stage_layers(layers, ParallelConfig(**parallel))


def test_devices_auto() -> None:
    def ranks(
        num_gpus: int = 0, world_size: str = "", devices: int | str = "auto", num_nodes: int = 1, **parallel
    ) -> int:
        run = read_run(tree(micro_batch_size=4, global_batch_size=32, **parallel), Config)
        run = replace(run, trainer=TrainerConfig(devices=devices, num_nodes=num_nodes))
        return ranks_per_node(run, num_gpus, {"WORLD_SIZE": world_size})

    four = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    assert (ranks(), ranks(cpu_data_parallel_size=2), ranks(**four)) == (1, 2, 4)
    assert (ranks(8, **four), ranks(8), ranks(3), ranks(6, tensor_model_parallel_size=2)) == (8, 8, 2, 4)
    assert (ranks(8, "4", **four), ranks(0, "16", num_nodes=2), ranks(8, devices=2)) == (4, 8, 2)
    with pytest.raises(ConfigError, match="WORLD_SIZE=4"):
        ranks(world_size="4", devices=2)


def test_numbers_that_have_a_word_beside_them_name_it() -> None:
    with pytest.raises(ConfigError, match="^trainer.devices=-1: must be 1 or more, or auto$"):
        TrainerConfig(devices=-1)
    right = "batch, or a number of tokens, model.encoder_seq_length or more"
    with pytest.raises(ConfigError, match=f"^model.data.pad_to=-1: must be {right}$"):
        DataConfig(pad_to=-1)


def test_batches_must_divide() -> None:
    assert num_micro_batches(4, 32, 2) == 4
    with pytest.raises(ConfigError, match="14 or 21 would"):
        num_micro_batches(7, 16, 1)


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        (OptimConfig(), (True, True)),
        (OptimConfig(overlap_grad_sync=False), (False, False)),
        (OptimConfig(overlap_param_sync=False), (True, False)),
        (OptimConfig(distributed=False), (True, False)),
        (OptimConfig(offload=0.5), (False, False)),
        (OptimConfig(offload=0.5, overlap_param_sync=True), (True, True)),
    ],
)
def test_what_overlaps_on_gpus(optim: OptimConfig, expected: tuple[bool, bool]) -> None:
    base = tree(global_batch_size=8)
    base["trainer"].update(devices=2)
    found = optim.settled(resolve(read_run(base, Config), 0, {}), "bf16", on_cpu=False)
    assert (found.overlap_grad_sync, found.overlap_param_sync) == expected


@pytest.mark.parametrize(
    ("precision", "optim", "sharded"),
    [
        ("bf16-mixed", OptimConfig(), False),
        ("bf16-mixed", OptimConfig(offload=0.5), True),  # Megatron offloads main weights that are sharded
        ("32", OptimConfig(offload=0.5), False),  # and others in fp32 alone
    ],
)
def test_one_replica_shards_what_is_offloaded(precision: str, optim: OptimConfig, sharded: bool) -> None:
    assert optim.shards(one_process(LanguageConfig()), precision) == sharded


def test_unsharded_main_weights_are_not_offloaded() -> None:
    base = tree(optim={"distributed": False, "offload": 0.5})
    base["trainer"]["precision"] = "bf16"
    with pytest.raises(ConfigError, match=r"model.optim.distributed=false: with .*offload=0.5 .* must be true"):
        check_optimizer(read_run(base, Config))


def test_what_tensor_parallelism_needs() -> None:
    model, tp4 = (
        LanguageConfig(num_attention_heads=8, num_query_groups=2),
        ParallelConfig(tensor_model_parallel_size=4),
    )
    check_model(model, tp4)  # fewer groups than ranks: they repeat
    for wrong in (
        {"num_query_groups": 3},
        {"num_attention_heads": 6, "num_query_groups": 6},
        {"ffn_hidden_size": 30},
        {"num_layers": 0},
    ):
        with pytest.raises(
            ConfigError,
            match=f"model.{'num_query_groups' if 'num_query_groups' in wrong else next(iter(wrong))}=",
        ):
            check_model(replace(model, **wrong), tp4)


def test_a_layout_on_a_cluster() -> None:
    base = tree(tensor_model_parallel_size=4, global_batch_size=128, micro_batch_size=8)
    base["trainer"].update(devices=8, num_nodes=2)
    layout = resolve(read_run(base, family("llava", "config").Config), 0, {})
    assert (layout.world_size, layout.data, layout.num_micro_batches, layout.samples_per_rank) == (
        16,
        4,
        4,
        32,
    )


PP2, FSDP = {"pipeline_model_parallel_size": 2}, {"fsdp": True}
FULL = {"activations_checkpoint_granularity": "full", "activations_checkpoint_method": "uniform"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_use_orig_params": False}, "model.fsdp_use_orig_params=false: FSDP2 always keeps"),
        (FSDP | PP2, "model.fsdp=true: model.pipeline_model_parallel_size=2; FSDP goes with tensor"),
        (FSDP | {"optim": {"name": "distributed_fused_adam"}}, "model.fsdp=true: FSDP shards and overlaps"),
        (FSDP | {"optim": {"overlap_grad_sync": True}}, "model.fsdp=true: FSDP shards and overlaps"),
        (FSDP | {"optim": {"overlap_param_sync": True}}, "model.fsdp=true: FSDP shards and overlaps"),
        (
            {"optim": {"overlap_param_sync": True, "overlap_grad_sync": False}},
            "model.optim.overlap_grad_sync=false: overlap_param_sync=true needs it; take true",
        ),
        (
            {"optim": {"overlap_param_sync": True, "offload": 0.5}},
            "model.optim.offload=0.5: with model.optim.overlap_param_sync=true it needs trainer.precision",
        ),
        (
            FSDP | {"fsdp_sharding_strategy": "hybrid"},
            "hybrid: 3 data- and context-parallel ranks do not divide into 2 copies",
        ),
        ({"fsdp_sharding_strategy": "zero"}, "model.fsdp_sharding_strategy=zero: must be one of full, hybrid, grad"),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            "model.virtual_pipeline_model_parallel_size=2: must be 1 without",
        ),
        (PP2 | {"virtual_pipeline_model_parallel_size": 2, "global_batch_size": 15}, "virtual stages need a multiple"),
        (
            {"optim": {"overlap_param_sync": True, "distributed": False}},
            "model.optim.overlap_param_sync=true: without model.optim.distributed",
        ),
        (
            {"optim": {"name": "mcore_distributed_optim", "distributed": False}},
            "model.optim.distributed=false: model.optim.name=mcore_distributed_optim is; take fused_adam",
        ),
        ({"optim": {"offload": 1.5}}, "model.optim.offload=1.5: must be from 0.0 to 1.0"),
        (
            {"optim": {"name": "distributed_fused_adam", "offload": 0.5}},
            "model.optim.offload=0.5: with model.optim.name=distributed_fused_adam it needs trainer.precision",
        ),
        ({"rampup_batch_size": [6, 4, 100]}, "model.rampup_batch_size=[6, 4, 100]: must be the first global batch"),
        ({"rampup_batch_size": [6, 9, 100]}, "model.rampup_batch_size=[6, 9, 100]: must be"),
        ({"rampup_batch_size": [6, 6]}, "model.rampup_batch_size=[6, 6]: must be a list of 3 values"),
        (FULL | {"activations_checkpoint_num_layers": 0}, "activations_checkpoint_num_layers=0: must be 1 or more"),
        (
            {"activations_checkpoint_granularity": "full", "activations_checkpoint_method": "block"}
            | {"activations_checkpoint_num_layers": 99},
            "model.activations_checkpoint_num_layers=99: no stage has more than 32 layers",
        ),
        ({"fsdp_grad_reduce_dtype": "bf16"}, "model.fsdp_grad_reduce_dtype=bf16: goes with model.fsdp=true"),
        ({"mm_cfg": {"llm": {"lr_ratio": -1.0}}}, "learning-rate ratio of language_model=-1.0: must be 0 or more"),
        ({"optim": {"lr": float("nan")}}, "model.optim.lr=nan: must be a number"),
        ({"max_skipped_steps": -1}, "model.max_skipped_steps=-1: must be 0 or more"),
        ({"seed": -1}, "model.seed=-1: must be 0 or more"),
        (FULL | {"activations_checkpoint_num_layers": 5}, "with activations_checkpoint_method=uniform the layers of"),
        (
            {
                "mm_cfg": {
                    "llm": {"freeze": True},
                    "vision_encoder": {"freeze": True},
                    "freeze_mm_mlp_adapter": True,
                }
            },
            "model.mm_cfg: language_model, vision_model, vision_projection are all frozen",
        ),
    ],
)
def test_what_does_not_go_together(settings: dict, message: str) -> None:
    """On three ranks without a pipeline, on two with one."""
    base = tree(**{"micro_batch_size": 3, "global_batch_size": 36} | settings)
    base["trainer"]["devices"] = settings.get("pipeline_model_parallel_size", 3)
    with pytest.raises(ConfigError, match=re.escape(message)):
        run = read_run(base, Config)
        check(run)
        check_optimizer(run)
        resolve(run, 0, {})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"monitor": "bleu"}, "checkpoint_callback_params.monitor=bleu: must be one of global_step"),
        ({"every_n_train_steps": 0}, "checkpoint_callback_params.every_n_train_steps=0: must be 1 or more, or null"),
        ({"save_top_k": -2}, "checkpoint_callback_params.save_top_k=-2: must be -1 (all) or more"),
        ({"train_time_interval": "1h"}, "checkpoint_callback_params.train_time_interval=1h: must be DD:HH:MM:SS"),
    ],
)
def test_checkpoint_settings(params: dict, message: str) -> None:
    base = tree()
    base["exp_manager"]["checkpoint_callback_params"] = params
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_run(base, Config)
