"""What people prefer, fed back: pairs -> a reward model -> a LoRA that is liked better, and once more (`loop`)."""
