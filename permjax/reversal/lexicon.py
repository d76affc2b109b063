"""The class of an English word by itself: function words by list, the rest by capitals, digits and endings.

The classes are those of `permjax.reversal.grammar`, and five that `permjax.reversal.rules` resolves by a word's
neighbours: `b` a noun or a verb, `A` a verb with a capital, `M` an auxiliary that a verb follows, `D` an adverb of
degree, `h` the word "that".
"""

import functools
import re

_FUNCTION_WORDS = {
    "d": (
        "a an the this these those my your his her its our their some any no every each all both either neither "
        "another such half whose"
    ),
    "u": (
        "i you he she it we they me him us them mine yours hers ours theirs myself yourself himself herself "
        "itself ourselves yourselves themselves there someone somebody something anyone anybody anything everyone "
        "everybody everything nobody nothing none oneself"
    ),
    "m": (
        "am is are was were be been being 'm 're 've have has had having i'm i've you're you've he's she's it's "
        "we're we've they're they've that's there's here's what's who's who've where's how's isn't aren't wasn't "
        "weren't haven't hasn't hadn't ain't"
    ),
    "M": (
        "do does did will would shall should can could may might must ought ca wo cannot 'll 'd let's i'll i'd "
        "you'll you'd he'll he'd she'll she'd it'll it'd we'll we'd they'll they'd that'll who'd don't doesn't "
        "didn't won't wouldn't shan't shouldn't can't couldn't mustn't needn't"
    ),
    "x": "not n't",
    "t": "to",
    "i": (
        "of in on at by for with from about into onto over after before between through under during without "
        "within against among amongst toward towards upon across behind beyond near since until till despite "
        "except than as per via along above below beneath beside besides inside outside throughout unlike like "
        "amid around versus off"
    ),
    "p": "up out down",
    "k": "and or but nor plus &",
    "h": "that",
    "D": "very so too quite rather extremely really fairly highly truly",
    "q": (
        "which who whom what when where why how because if while although though whether unless whereas whenever "
        "wherever whatever whoever once lest"
    ),
    "s": "'s '",
    "c": (
        "one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred "
        "thousand million billion dozen %"
    ),
    "j": (
        "more most less least few many much several other same own first second third last next new old good "
        "great big small large little long short high low young early late likely able unable better best worse "
        "worst bad full free available possible sure different important true due friendly daily only"
    ),
    "r": (
        "also just then now here even still already again often never always ever soon almost perhaps maybe "
        "however therefore thus instead away together yet far well later ago sometimes else today tomorrow "
        "yesterday tonight back forward ahead apart indeed hence moreover nevertheless meanwhile anyway twice "
        "elsewhere everywhere somewhere nowhere overall abroad home pretty enough nearly hardly"
    ),
    "o": "yes yeah oh uh um hmm hello please okay ok hi wow",
    "n": (
        "family reply july italy bully belly jelly king thing ring wing string spring evening morning building "
        "wedding ceiling meeting feeling beginning bed seed speed breed weed shed way thanks"
    ),
    "e": (
        "been known born gone done seen given taken written made driven broken chosen spoken stolen grown shown "
        "thrown worn torn fallen forgotten hidden eaten beaten risen woven sworn drawn frozen sent built paid "
        "brought bought caught taught held lost won found kept left meant sold told thought felt"
    ),
}

_PLAIN_VERBS = (
    "said got went saw knew took came gave wrote spoke became began ran sat stood met led heard lay fell grew "
    "rose wore broke ate drew drove flew threw chose forgot sang sank swam shook woke slept dealt understood "
    "understand know knows think thinks get gets make makes go goes take takes give gives say says tell tells see "
    "sees come comes want wants become becomes seem seems believe believes keep keeps put puts let lets bring "
    "brings begin begins happen happens write writes provide provides include includes continue continues learn "
    "learns speak speaks allow allows add adds grow grows create creates consider considers appear appears buy "
    "buys serve serves send sends expect expects remember remembers suggest suggests require requires describe "
    "describes remain sell sells pay pays lose loses meet meets decide decides agree agrees explain explains "
    "develop develops carry carries receive receives ask asks apply applies choose chooses realize realizes prove "
    "proves wear wears seek seeks maintain maintains occur occurs contain contains reduce reduces establish "
    "identify identifies determine determines exist exists enjoy enjoys avoid avoids imagine tend tends discuss "
    "prevent prevents accept accepts prepare prepares discover discovers enter enters eat eats destroy destroys "
    "ensure ensures achieve achieves involve involves hear hears find finds tries wonders introduce introduces "
    "protect depends depend belong belongs encourage improve improves arrive arrives marry marries die dies "
    "follow follows forget forgets respond guess hate listen assume produce produces contribute extend solve fail "
    "fails suppose explore ignore indicate submit argue argues join joins represent represents remove prefer "
    "observe intend recognize suffer convince react defend define operate obtain promote propose admit insist "
    "gather pursue adopt compare specify recall worry participate appreciate conclude eliminate express fought "
    "hung survive survives own owns invent invents perform performs publish unveil unveils uncover uncovers "
    "compose composes"
)

_NOUN_OR_VERB = (
    "lead leads stand stands try read reads hold holds live lives hope hopes feel feels wonder leave remains look "
    "looks open opens offer offers wish hit hurt mention spread control leaves address object fit push pull gain "
    "work works use uses call calls need needs help helps show shows play plays move moves turn turns start "
    "starts run runs talk talks love loves change changes stop stops report reports plan plans point points "
    "support supports act acts cause causes end ends face faces form forms study studies visit visits watch walk "
    "walks wait waits reach result results return returns claim claims raise raises share shares stay stays cut "
    "cuts set sets cover covers name names test tests mean means place places increase increases answer answers "
    "design designs fight fights attempt attempts sign signs drop drops lift drink pass passes check checks order "
    "orders pick picks rise rises note notes refer refers focus spend spends win wins save saves thank deal deals "
    "smile matter matters sound sounds seat care cost costs drive drives fall falls kill kills build builds break "
    "breaks teach teaches catch catches throw throws sit sits send sleep sleeps"
)

_PUNCTUATION = {
    **dict.fromkeys(".,:;!?)]}…'-–—/\\|~*_", "."),
    **dict.fromkeys("([{`‘“¿¡#$£€<", "("),
    '"': '"',
    "”": ".",
    "’": ".",
    ">": ".",
    "''": ".",
    "``": "(",
    "--": ".",
    "...": ".",
}


def _listed() -> dict[str, str]:
    classes = dict.fromkeys(_NOUN_OR_VERB.split(), "b") | dict.fromkeys(_PLAIN_VERBS.split(), "v")
    return classes | {word: letter for letter, words in _FUNCTION_WORDS.items() for word in words.split()}


_LISTED = _listed()
_NUMBER = re.compile(r"[$£€#]?[-+]?\d[\d.,:/%-]*(?:st|nd|rd|th|s)?", re.IGNORECASE)
_ENDINGS = (("ly", "r"), ("ing", "g"), ("ed", "e"))
_ADJECTIVES = ("ous", "ful", "ible", "less", "ish")


@functools.lru_cache(maxsize=1 << 18)
def word_class(piece: str) -> str:
    """The class of a word or punctuation mark, white space around it or not.

    Example:
        >>> "".join(map(word_class, ["The", " quiet", " dogs", " sleep", "."]))
        'dnnb.'
    """
    word = piece.strip()
    if not word:
        return "(" if piece else "o"
    if word in _PUNCTUATION:
        return _PUNCTUATION[word]
    plain = word.replace("’", "'")
    lower = plain.lower()
    if letter := _LISTED.get(lower):
        return "A" if letter in "vbe" and plain[0].isupper() else letter
    if _NUMBER.fullmatch(plain):
        return "c"
    if not any(map(str.isalnum, plain)):
        return _PUNCTUATION.get(plain[0], "o")
    return _by_form(plain, lower)


def _by_form(word: str, lower: str) -> str:
    if lower.endswith(("'s", "s'")):
        return "S"
    if word[0].isupper():
        return "N"
    if len(lower) > 4:
        for ending, letter in _ENDINGS:
            if lower.endswith(ending):
                return "j" if "-" in lower and letter in "ge" else letter
        if lower.endswith(_ADJECTIVES):
            return "j"
    return "n"
