"""Explained images: their PNGs, folders and HTML page; plots of measures.

Imports captioning.data (images), captioning.explanation (the list of methods), captioning.metrics
(object words) and the modules of captioning."""
