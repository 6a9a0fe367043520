"""Caption metrics beyond those of the packages pycocoevalcap and bert: object words, CHAIR,
tables of scores, and the PTB tokeniser without Java.

Imports captioning.data and the modules of captioning."""
