"""BERTScore of captions, by the package bert-score (bert/requirements.txt): `bert.bertscore.bert_score`."""
