"""What the two models and the scripts share, one concern a file."""
