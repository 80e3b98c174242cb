"""The two training commands of NeMo's LLaVA guide, key by key, and the environment that goes before them."""

from __future__ import annotations

ENVIRONMENT = {
    "MASTER_PORT": "50000",
    "MASTER_ADDR": "10.205.23.131",
    "WORLD_SIZE": "8",
    "NODE_RANK": "0",
    "GLOO_SOCKET_IFNAME": "ens10f0np0",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}
SHARED = {
    "model.mm_cfg.llm.from_pretrained": "checkpoints/vicuna-7b-v1.5-mcore.nemo",
    "model.mm_cfg.vision_encoder.from_pretrained": "checkpoints/clip-vit-large-patch14-336",
    "model.data.image_token_len": "576",
    "model.data.crop_size": "[336,336]",
    "model.data.image_size": "[336,336]",
    "model.mm_cfg.vision_encoder.hidden_size": "1024",
    "model.mm_cfg.vision_encoder.class_token_length": "1",
    "model.tokenizer.library": "huggingface",
    "model.tokenizer.model": "null",
    "model.tokenizer.type": "checkpoints/llama2_tokenizer",
    "model.tensor_model_parallel_size": "4",
    "model.encoder_seq_length": "4096",
    "trainer.num_nodes": "1",
    "trainer.max_epochs": "-1",
    "model.mm_cfg.vision_encoder.freeze": "True",
    "model.mm_cfg.mm_mlp_adapter_type": "mlp2x_gelu",
}
PRETRAIN = SHARED | {
    "model.data.data_path": "datasets/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
    "model.data.image_folder": "datasets/LLaVA-Pretrain/images",
    "model.micro_batch_size": "32",
    "trainer.max_steps": "2176",
    "model.optim.sched.warmup_steps": "65",
    "model.data.conv_template": "plain",
    "model.mm_cfg.use_image_tile": "False",
    "model.data.dataloader_type": "cyclic",
    "exp_manager.name": "llava_vicuna_7b_clip_pretrain_tp4_pp1",
}
FIRST_STAGE = "nemo_experiments/{0}/checkpoints/{0}.nemo".format(PRETRAIN["exp_manager.name"])
SFT = SHARED | {
    "model.mm_cfg.pretrain_mm_mlp_adapter": FIRST_STAGE,
    "model.data.data_path": "datasets/LLaVA-finetune/llava_v1_5_mix665k.json",
    "model.data.image_folder": "datasets/combined_images",
    "model.micro_batch_size": "8",
    "trainer.max_steps": "5197",
    "model.optim.sched.warmup_steps": "155",
    "model.data.conv_template": "v1",
    "model.data.dataloader_type": "modality",
    "model.data.sep_image_conv_front": "True",
    "model.mega_batch_mult": "50",
    "model.activations_checkpoint_granularity": "full",
    "model.activations_checkpoint_method": "uniform",
    "model.activations_checkpoint_num_layers": "1",
    "exp_manager.name": "llava_vicuna_7b_clip_finetune_tp4_pp1",
}
COMMANDS = {"llava_7b_pretrain": PRETRAIN, "llava_7b_finetune": SFT}


def overrides(command: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in command.items()]
