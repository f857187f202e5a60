"""Files of checkpoints: safetensors, Megatron's distributed format, directories that appear whole."""
