"""Measures of explanations: ablation, deletion and insertion, localisation, sanity checks, true and false positives.

Imports every other sub-package but captioning.training."""
