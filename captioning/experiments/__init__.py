"""Experiments on explanations: what they are worth, measured on the words of captions.

Modules, from the lowest to the highest; each imports only those before it, captioning.{data,
explanation,report} and captioning.grounding:

    experiment      what every experiment consists of, and the tables of its results
    batch           a batch of captioned images and the explanations of its words
    ablation, …     one experiment each: its words, what it measures, its table and its plot
    registry        the experiments by name
    runner          the loop over a split that writes their tables and plots
"""
