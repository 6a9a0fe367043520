"""The demo data set: synthetic scenes with exact captions, boxes and masks, and a planted bias.

`scenes` samples and describes scenes, `drawing` draws them, `generate` writes the data set. They
import only captioning.data, captioning.errors and captioning.files."""
