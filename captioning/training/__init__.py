"""Training and fine-tuning: loop, losses, self-critical training, CIDEr-D reward, resuming, log."""
