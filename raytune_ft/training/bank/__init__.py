"""Many LoRA trials on one frozen base, trained together; each gets the losses it would get alone."""
