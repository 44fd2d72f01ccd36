"""LoRA adapters: what one is, which versions exist, and how it is read and written as a PEFT folder."""
