"""Between Hugging Face and Megatron checkpoints: converting, the manifest, verifying."""
