"""Annotations, vocabulary, images, data sets, predictions, stored features and synthetic demo scenes.

Modules of this package import only one another and `captioning.errors` and `captioning.files`.
"""
