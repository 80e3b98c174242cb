"""Files that hold tensors, read in place without executing anything: safetensors, torch's, Megatron's, and tars."""
