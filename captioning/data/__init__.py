"""Annotations, vocabulary, images, data sets, predictions, stored features and synthetic demo scenes.

Imports only the modules of captioning (errors, files, weights).
"""
