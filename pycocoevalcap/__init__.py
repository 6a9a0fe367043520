"""Caption metrics based on the installed package pycocoevalcap: see `caption_metrics`.

The modules of the installed package can be imported under the same name (pycocoevalcap.cider, …).
"""
from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
