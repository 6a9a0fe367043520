"""Caption metrics beyond those of the packages pycocoevalcap and bert: object words, CHAIR and tables of scores.

Imports captioning.data and the modules of captioning."""
