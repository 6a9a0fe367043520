"""The PTB tokeniser of Stanford CoreNLP 3.4.1, which the official caption metrics use, in Python,
for machines without Java.

It has the same tokens for all but 8 of the 616,767 captions of COCO 2014, of which
tests/metrics/test_ptb_tokeniser.py compares a sample; rare forms in other texts may differ.
"""
import html
import re

from captioning.data.vocabulary import MARKS

# dropped by the official metrics; brackets are kept
PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
ABBREVIATIONS = (
    "mr mrs ms dr st ave etc rd blvd bldg penn co inc jr sr dept bros vs prof ft mt ct jan feb "
    "mar apr aug sept oct nov dec mon tues wed thurs fri gov gen sgt lt col capt rev hon ph est al "
    "corp ltd calif ky ind ga fla ste sq")
SPELLINGS = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "£": "#", "€": "$",
                           "–": "--", "—": "--", "…": "...", "\u00ad": "",
                           **dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\ufeff", " ")})
SYMBOLS = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "¢": "cents"}
LETTER = rf"(?: [^\W_] | [{MARKS}] )"      # or digit

# a token is the first alternative that matches; (?i:…): regardless of case
TOKEN = re.compile(rf"""
    (?i: (?:https?://|www\.) [^\s"<>()]+ [^\s"<>().,;:!?']
       | [\w.+-]+ @ \w+ (?:\.\w+)+
       | </?[a-z][\w:.-]*(?:\ [^<>]*)?>                                   # a tag
       | [@#][a-z]\w*
       | [<>]? [:;=] [-o*']? [()DPp] (?![a-z])                          # an emoticon
       | (?:[a-z]\.){{2,}} (?![a-z0-9])                                 # t.v.
       | (?:{"|".join(ABBREVIATIONS.split())})\. (?!\w)
       | no\. (?=\s*\d)
       | [a-z]\. (?! \s*$ | \s+(?:the|a|an)\b | \w )                    # an initial
       | [^\W_]+\. (?=[,;])
       | (?<!\S)-\d+(?:[.,]\d+)*
       | \d+ (?:[.,:/]\d+)+ (?![-\w]) | \d+ (?:[.,:/]\d+)+ (?=[ap]m\b) | [.,:+]\d+\b
       | [cs]'mo(?:n|res)\b | (?-i:[jyY])'(?=\w)
       | '(?:n'|n\b|em\b|till?\b|cause\b|\d\ds\b)
       | (?<!')'(?:s|d|m|ll|re|ve)\b | n['`]t\b
       | [^\W_]+ (?=n['`]t\b) | can(?=not\b)
       | (?:wan|gon)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b) )
    | [A-Z]+ (?:&[A-Z]+)+                                               # AT&T, but black & white
    | (?i: (?:dunkin|ol|somethin)'
       | c\+\+ | [cf]\#
       | [½¼¾⅓⅔]
       | \w[\w{MARKS}]* (?: [-/.] {LETTER}+
                         | (?<=[aeiou])['`](?=[aeiou]) {LETTER}+                # Hawai'i
                         | (?<=(?<!-)\b(?-i:[dlonA-HJ-XZ]))['`] {LETTER}{{2,}} )* )
    | [?!]+ | >> | [^\s"{MARKS}\U00010000-\U0010ffff]
""", re.VERBOSE)


def ptb_tokens(text):
    """Lower-case tokens of a caption without punctuation: "A dog's." -> ("a", "dog", "'s")."""
    tokens = []
    for token in TOKEN.findall(html.unescape(text).translate(SPELLINGS)):
        if token not in PUNCTUATION:
            token = re.sub(r"[][(){}]", lambda bracket: BRACKETS[bracket[0]], token.lower())
            tokens.append(SYMBOLS.get(token, token))
    return tuple(tokens)
