"""The tokens that Stanford's PTB tokeniser (CoreNLP 3.4.1), which the official caption metrics use, gives for captions;
without Java. tests/test_tokeniser.py compares the two on COCO's captions."""
import re
from functools import lru_cache

# what the official metrics drop; in capitals there, brackets stay
PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
ABBREVIATIONS = ("mr mrs ms dr st ave etc rd blvd bldg penn co inc jr sr dept bros vs prof ft mt ct jan feb sept oct "
                 "mon tues gov gen sgt lt col capt rev hon ph est al corp ltd calif ky ind ga fla ste sq")
SPELLINGS = str.maketrans("‘’`“”–—…£€", "'''\"\"--…#$") | {ord("–"): "--", ord("—"): "--", ord("…"): "..."}

# the first alternative that fits is the token; (?i:…) where capitals do not matter
TOKEN = re.compile(rf"""
    (?i: (?:https?://|www\.) [^\s"<>()]+ [^\s"<>().,;:!?']
       | [\w.+-]+ @ \w+ (?:\.\w+)+
       | [@#][a-z]\w*
       | [<>]? [:;=] [-o*']? [()DPp] (?![a-z])                          # a smiley
       | (?:[a-z]\.){{2,}} (?![a-z0-9])                                 # t.v.
       | (?:{"|".join(ABBREVIATIONS.split())})\. (?!\w)
       | no\. (?=\s*\d)
       | [a-z]\. (?! \s*$ | \s+(?:the|a|an)\b | \w )                    # an initial
       | [^\W_]+\. (?=[,;])
       | \d+ (?:[.,:/]\d+)+ (?![-\w]) | \d+ (?:[.,:/]\d+)+ (?=[ap]m\b) | [.,:+]\d+\b
       | '(?:n'|n\b|em\b|till?\b|cause\b|\d\ds\b)
       | (?<!')'(?:s|d|m|ll|re|ve)\b | n't\b
       | [^\W_]+ (?=n't\b) | can(?=not\b) | (?:wan|gon)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b) )
    | [A-Z]+ (?:&[A-Z]+)+                                               # AT&T, but black & white
    | (?i: (?:dunkin|ol|somethin)'
       | c\+\+
       | \w+ (?: [-/.] [^\W_]+ | (?:(?<=[aeiou])'(?=[aeiou]) | (?<=\b[dlo])')[a-z]+ )* )
    | [?!]+ | >> | [^\s"\U00010000-\U0010ffff]
""", re.VERBOSE)


@lru_cache(maxsize=1 << 16)     # references come again with every validation
def ptb_tokens(text):
    """Lower-case tokens of a sentence, punctuation dropped: "A dog's T-shirt." -> ("a", "dog", "'s", "t-shirt")."""
    tokens = (token.lower() for token in TOKEN.findall(text.translate(SPELLINGS)))
    tokens = (re.sub(r"[][(){}]", lambda bracket: BRACKETS[bracket[0]], token) for token in tokens)
    return tuple(token for token in tokens if token not in PUNCTUATION)
