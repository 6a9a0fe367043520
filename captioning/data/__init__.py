"""Annotations, vocabulary, images, data sets, predictions, stored features and demo scenes.

Imports only the modules of the folder above (errors, files)."""
