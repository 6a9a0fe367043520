"""Plots, folders of explanations and the HTML page.

Imports captioning.data (images), captioning.explanation (the list of methods) and the modules of captioning.
"""
