"""What the two captioning models and several scripts share.

Modules of this folder serve all others. `interrupt`, `errors`, `memory`, `files`, `processes`, `runs`, `device`,
`weights`, `cli`, `published`, `recurrence` and `decoding` import no sub-package; `checkpoint` imports data and
explanation, and the models where it creates one; `grounding` imports data and metrics.
Sub-packages, from the lowest to the highest; each may import those before it, but no script:

    data         annotations, vocabulary, images, stored features, demo scenes
    explanation  relevance rules, encoders, explanations of both models, LRP-inference
    metrics      object words, CHAIR, tables of scores
    training     the training loop, losses, self-critical training
    report       plots and the HTML page
    experiments  measures of explanations

`api` is what users import in Python: from captioning import explain.
"""


def __getattr__(name):
    """`explain` of captioning.api, imported when it is used: the scripts do not need it."""
    if name == "explain":
        from captioning.api import explain
        return explain
    raise AttributeError(f"module 'captioning' has no attribute {name!r}")
