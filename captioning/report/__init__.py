"""Plots and the HTML page.

Imports captioning.explanation's list of methods and the modules of captioning (files).
"""
