"""The demo data set: synthetic scenes whose captions, boxes and masks are exact, with a planted bias.

`scenes` samples and describes scenes, `drawing` draws them, `generate` writes the data set. They import only
captioning.data, captioning.errors and captioning.files.
"""
