"""Measures of explanations: ablation, deletion and insertion, localisation, sanity checks, true and false positives.

Modules, from the lowest to the highest; each imports only those before it, and no other sub-package than
captioning.{data,explanation,report}, nor than the module captioning.grounding:

    correctness, localisation    relevance inside boxes and masks
    batch                        a batch of captioned images and the explanations of its words
    ablation, deletion_insertion, tpfp, sanity, grounding    the other measures
    registry                     the experiments by name: words, measures, table, plot
    runner                       the loop over a split, its part files and tables
    calibration                  the threshold of flags, fitted to a validation split
"""
