"""The PTB tokeniser of Stanford CoreNLP 3.4.1, which the official caption metrics use, in Python.

It reproduces the tokens of captions: tests/metrics/test_ptb_tokeniser.py compares both on captions
of COCO.
"""
import re
from functools import lru_cache

# dropped by the official metrics; brackets are kept
PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
ABBREVIATIONS = (
    "mr mrs ms dr st ave etc rd blvd bldg penn co inc jr sr dept bros vs prof ft mt ct jan feb "
    "sept oct mon tues gov gen sgt lt col capt rev hon ph est al corp ltd calif ky ind ga fla ste "
    "sq")
SPELLINGS = str.maketrans({"‘": "'", "’": "'", "`": "'", "“": '"', "”": '"', "£": "#", "€": "$",
                           "–": "--", "—": "--", "…": "..."})

# a token is the first alternative that matches; (?i:…): regardless of case
TOKEN = re.compile(rf"""
    (?i: (?:https?://|www\.) [^\s"<>()]+ [^\s"<>().,;:!?']
       | [\w.+-]+ @ \w+ (?:\.\w+)+
       | [@#][a-z]\w*
       | [<>]? [:;=] [-o*']? [()DPp] (?![a-z])                          # an emoticon
       | (?:[a-z]\.){{2,}} (?![a-z0-9])                                 # t.v.
       | (?:{"|".join(ABBREVIATIONS.split())})\. (?!\w)
       | no\. (?=\s*\d)
       | [a-z]\. (?! \s*$ | \s+(?:the|a|an)\b | \w )                    # an initial
       | [^\W_]+\. (?=[,;])
       | \d+ (?:[.,:/]\d+)+ (?![-\w]) | \d+ (?:[.,:/]\d+)+ (?=[ap]m\b) | [.,:+]\d+\b
       | '(?:n'|n\b|em\b|till?\b|cause\b|\d\ds\b)
       | (?<!')'(?:s|d|m|ll|re|ve)\b | n't\b
       | [^\W_]+ (?=n't\b) | can(?=not\b)
       | (?:wan|gon)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b) )
    | [A-Z]+ (?:&[A-Z]+)+                                               # AT&T, but black & white
    | (?i: (?:dunkin|ol|somethin)'
       | c\+\+
       | \w+ (?: [-/.] [^\W_]+ | (?:(?<=[aeiou])'(?=[aeiou]) | (?<=\b[dlo])')[a-z]+ )* )
    | [?!]+ | >> | [^\s"\U00010000-\U0010ffff]
""", re.VERBOSE)


@lru_cache(maxsize=1 << 16)     # every validation tokenises the same references
def ptb_tokens(text):
    """Lower-case tokens of a caption without punctuation: "A dog's." -> ("a", "dog", "'s")."""
    tokens = []
    for token in TOKEN.findall(text.translate(SPELLINGS)):
        if token not in PUNCTUATION:
            token = re.sub(r"[][(){}]", lambda bracket: BRACKETS[bracket[0]], token.lower())
            tokens.append(token)
    return tuple(tokens)
