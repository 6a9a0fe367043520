"""Training and fine-tuning: loop, losses, self-critical training, reward, training state and log.

Imports captioning.data, captioning.explanation and the modules of captioning."""
