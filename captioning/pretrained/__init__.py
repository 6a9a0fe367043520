"""Captioners of the library `transformers`, explained like the models of this project.

Import `load`. A model is an image-to-text model with an image encoder: encoder and decoder joined
by VisionEncoderDecoderModel, BLIP, GIT, or a language model that reads tokens of an image (BLIP-2,
LLaVA, PaliGemma, SmolVLM and others). Nothing in the library is changed: the rules of
captioning.explanation surround a forward pass (`passes`), in which hooks make leaves of what is
explained. Relevance belongs to words, not to the pieces of words that the model reads (`words`).
"""
from captioning.pretrained.reading import load

__all__ = ["load"]
