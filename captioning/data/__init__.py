"""Annotations, vocabulary, images, data sets, predictions, stored features and demo scenes.

Imports only modules of captioning (errors, files, weights, device, processes)."""
