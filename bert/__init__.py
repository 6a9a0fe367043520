"""BERTScore of captions, computed by the installed package bert-score: see `bertscore`."""
