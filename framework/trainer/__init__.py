"""The training side: a Protocol and its two backends, megatron/ (tensor parallel) and hf/ (the reference)."""
