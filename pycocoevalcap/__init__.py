"""Caption metrics: `scores` of this folder, on top of the installed package pycocoevalcap, whose modules stay reachable
under the same name (pycocoevalcap.cider, pycocoevalcap.bleu, …)."""
from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
