"""The demo data set: synthetic scenes with captions, boxes and masks, in which everything is known exactly.

Imports only captioning.data and the modules of captioning."""
