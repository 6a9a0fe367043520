"""BERTScore of captions, by the package bert-score (bert/requirements.txt): `bert.score.bert_score`."""
