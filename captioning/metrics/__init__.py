"""Metrics of captions beyond those of pycocoevalcap and bert: object words, CHAIR, tables of scores.

Imports captioning.data and the modules of captioning."""
