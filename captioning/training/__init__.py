"""Training and fine-tuning: options, loop, losses, self-critical training, CIDEr-D reward, resuming and the log.

Imports captioning.data, captioning.explanation and the modules of captioning."""
