"""What the captioning models and several scripts share.

In Python:

    from captioning import explain      # explain("photo.jpg") captions it and explains every word
    from captioning import LRP          # with LRP(): …  torch's functions propagate relevance

Modules of this folder serve all others. `captioner` is the base class of the models, `layers` the
equations that they share. Sub-packages, from the lowest to the highest; each may import those
before it, but no script:

    data         annotations, vocabulary, images, stored features, demo scenes
    explanation  relevance rules, encoders, explanations of the models, LRP-inference
    metrics      object words, CHAIR, tables of scores
    training     the training loop, losses, self-critical training
    report       explained images, plots and the HTML page
    experiments  measures of explanations
    pretrained   captioners of the library transformers, used like the models
"""


def __getattr__(name):
    """`explain` and `LRP`, imported when they are used: the scripts do not need them."""
    if name == "explain":
        from captioning.api import explain
        return explain
    if name == "LRP":
        from captioning.explanation.rules import LRP
        return LRP
    raise AttributeError(f"module 'captioning' has no attribute {name!r}")
