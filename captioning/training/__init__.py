"""Training and fine-tuning: loop, losses, self-critical training, CIDEr-D, resuming, log.

Imports captioning.data, captioning.explanation and the modules of captioning."""
