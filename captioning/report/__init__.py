"""Explained images: their PNGs, folders and HTML page; plots of training and measures.

Imports captioning.data (images), captioning.explanation (the list of methods) and the modules of
captioning."""
