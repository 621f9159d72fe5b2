"""The texts that the text encoder learns from, besides the captions: words, dictionary entries, phrases."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

DICTIONARY = Path("/usr/share/wordnet")  # Debian's wordnet-base (WordNet 3.0 licence: free use with its notice)

# WordNet's files of nouns (wordnet's lexnames(5)) that can be drawn, or that say a mood.
NOUN_FILES = {
    "05": "animal",
    "06": "artifact",
    "08": "body",
    "12": "feeling",
    "13": "food",
    "17": "object",
    "18": "person",
    "19": "phenomenon",
    "20": "plant",
}
GLOSS_WORDS = 5  # longer glosses are left out

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "golden")
MOODS = ("happy", "sad", "angry", "scared", "sleepy", "surprised", "funny", "cute", "evil", "shy", "silly", "tired")
LOOKS = ("big", "small", "tiny", "huge", "old", "new", "round", "shiny", "pretty", "spooky", "fluffy", "little")
STYLES = ("cartoon", "flat", "3d", "pixel art", "icon", "sticker", "drawing", "emoji", "clip art", "outline")
PHRASES = (
    "a {noun}",
    "an image of a {noun}",
    "a picture of a {noun}",
    "{noun} emoji",
    "the {noun}",
    "two {noun}s",
    "{colour} {noun}",
    "a {colour} {noun}",
    "a {mood} {noun}",
    "{mood} {noun}",
    "a {look} {noun}",
    "{look} {noun}",
    "a {look} {colour} {noun}",
    "a {mood} {colour} {noun}",
    "{noun}, {style}",
    "{style} of a {noun}",
    "a {noun} with a {other}",
    "{noun} and {other}",
    "a {noun} on a {other}",
    "{noun} with {colour} {other}",
)
INFORMAL = (
    "doggo",
    "pupper",
    "doggy",
    "puppy",
    "pup",
    "hound",
    "pooch",
    "kitty",
    "kitten",
    "kitty cat",
    "moggy",
    "feline",
    "bunny",
    "bunny rabbit",
    "hare",
    "piggy",
    "horsey",
    "pony",
    "birdie",
    "chick",
    "duckling",
    "teddy",
    "teddy bear",
    "froggy",
    "fishy",
    "moo cow",
    "lamb",
    "sheepie",
    "mousie",
    "bug",
    "ladybug",
    "ladybird",
    "smiley",
    "smiley face",
    "happy face",
    "sad face",
    "angry face",
    "crying face",
    "laughing face",
    "winking face",
    "lol",
    "rofl",
    "xoxo",
    "thumbs up",
    "high five",
    "car",
    "auto",
    "motorcar",
    "motorbike",
    "bike",
    "choo choo train",
    "plane",
    "aeroplane",
    "jet",
    "ship",
    "boat",
    "spaceship",
    "burger",
    "cheeseburger",
    "fries",
    "chips",
    "soda",
    "coke",
    "coffee",
    "cuppa",
    "tea",
    "beer",
    "wine",
    "pie",
    "cake",
    "donut",
    "sweets",
    "candy",
    "ice lolly",
    "sandwich",
    "sushi",
    "noodles",
    "soccer",
    "football",
    "soccer ball",
    "hoops",
    "tennis",
    "telly",
    "tv",
    "laptop",
    "pc",
    "phone",
    "cell phone",
    "mobile",
    "camera",
    "specs",
    "shades",
    "sneakers",
    "trainers",
    "heels",
    "jewel",
    "diamond",
    "ring",
    "cash",
    "money",
    "bucks",
    "poo",
    "poop",
    "ghostie",
    "spook",
    "zombie",
    "vampire",
    "witch",
    "wizard",
    "santa",
    "santa claus",
    "snowman",
    "xmas tree",
    "christmas tree",
    "pumpkin",
    "jack o lantern",
    "love heart",
    "broken heart",
    "love",
    "lovely",
    "angry",
    "sad",
    "happy",
    "sleepy",
    "sick",
    "cold",
    "hot",
    "sun",
    "sunny",
    "rain",
    "rainy",
    "snow",
    "thunder",
    "lightning",
    "storm",
    "rainbow",
    "moon",
    "star",
    "stars",
    "earth",
    "fire",
    "flame",
    "water",
    "wave",
    "tree",
    "flower",
    "rose",
    "leaf",
    "grass",
    "mushroom",
    "house",
    "home",
    "castle",
    "church",
    "school",
    "hospital",
)

# A few words that users type, each with a pattern of the labels that would be right: what `words_right` measures.
MEANT = {
    "happy kitty": r"\bcat\b",
    "kitten": r"\bcat\b",
    "feline": r"\bcat\b|tiger|lion|leopard",
    "doggo": r"\bdog\b|poodle",
    "puppy": r"\bdog\b|poodle",
    "automobile": r"automobile|\bcar\b",
    "sports car": r"\bcar\b|automobile",
    "sad face": r"sad|frown|cry|pensive|disappoint|downcast|sob|tear|unamused|worried",
    "smiley": r"smil|grin|beam",
    "angry man": r"angry|anger|enraged|pouting|rage|mad",
    "soccer ball": r"soccer",
    "burger": r"hamburger",
    "spooky ghost": r"ghost",
    "little bunny": r"rabbit",
    "birthday party": r"birthday|party|confetti",
    "spaceship": r"rocket|saucer|shuttle",
    "airplane ride": r"airplane",
    "train engine": r"locomotive|train",
    "motorbike": r"motorcycle|scooter",
    "sailing ship": r"sail|ship|boat",
    "cup of coffee": r"hot beverage|coffee",
    "glass of wine": r"wine",
    "pint of beer": r"beer",
    "slice of pizza": r"pizza",
    "doughnut": r"doughnut",
    "tasty cake": r"cake",
    "french fries": r"fries",
    "crown of a king": r"crown|prince|king",
    "diamond ring": r"ring|gem",
    "red rose": r"rose|red flower",
    "christmas": r"christmas|santa|claus",
    "halloween pumpkin": r"jack-o-lantern|pumpkin",
    "thunderstorm": r"lightning|storm|thunder|rain",
    "full moon tonight": r"moon",
    "sunshine": r"sun",
    "snowy day": r"snow",
    "big tree": r"tree",
    "cell phone": r"phone",
    "laptop computer": r"laptop|computer",
    "video camera": r"camera",
    "sunglasses": r"sunglasses",
    "bride": r"veil|bride|wedding",
    "doctor": r"health|doctor|stethoscope|medic",
    "police officer": r"police",
    "fireman": r"fire",
    "stop sign": r"stop|no entry|prohibited",
    "broken heart": r"broken heart|mending",
    "i love you": r"love|heart",
    "money bag": r"money",
    "poop": r"poo",
    "monkey": r"monkey|gorilla|orangutan",
    "grizzly bear": r"bear",
    "king of the jungle": r"lion|tiger|gorilla",
    "honey bee": r"bee|honey",
    "serpent": r"snake",
    "sea creature": r"octopus|fish|whale|crab|squid|shark|dolphin|coral",
}


class MissingDictionary(RuntimeError):
    """WordNet is not installed; the message says what to install."""


def whole_words(vocabulary: Iterable[str]) -> list[str]:
    """The plain English words among a WordPiece vocabulary's entries."""
    return [entry for entry in vocabulary if re.fullmatch(r"[a-z]{3,}", entry)]


def corpus(labels: Sequence[str], known: Iterable[str], dictionary: Path = DICTIONARY) -> Iterator[str]:
    """All texts, some of them twice, always in the same order.

    `known` are single words; dictionary entries with other words (Latin names, mostly) are left out, and of `known`
    itself what the dictionary does not have (names of people and places, mostly).
    """
    known = list(known)
    listed = lemmas(dictionary)
    yield from (w for w in known if w in listed or w.removesuffix("s") in listed)
    yield from INFORMAL
    nouns: dict[str, None] = {}
    for names, gloss in entries(dictionary, frozenset(known)):
        nouns[names[0]] = None
        yield from (names[0], ", ".join(names[:3]))
        if len(gloss.split()) <= GLOSS_WORDS:
            yield gloss
    short = [label for label in dict.fromkeys(labels) if len(label.split()) <= 3 and ":" not in label]
    yield from phrases([*short, *INFORMAL], short, 6)
    yield from phrases([noun for noun in nouns if " " not in noun], short, 1)


def phrases(nouns: Sequence[str], others: Sequence[str], each: int) -> Iterator[str]:
    """`each` phrases about every noun; which ones is decided by the noun's hash."""
    for noun in nouns:
        for i in range(each):
            pick = hashlib.sha256(f"{noun} {i}".encode()).digest()
            phrase = PHRASES[pick[0] % len(PHRASES)]
            text = phrase.format(
                noun=noun,
                colour=COLOURS[pick[1] % len(COLOURS)],
                mood=MOODS[pick[2] % len(MOODS)],
                look=LOOKS[pick[3] % len(LOOKS)],
                style=STYLES[pick[4] % len(STYLES)],
                other=others[int.from_bytes(pick[5:8], "big") % len(others)],
            )
            yield re.sub(r"\ba (?=[aeiou])", "an ", text)


def entries(folder: Path, known: frozenset[str]) -> Iterator[tuple[list[str], str]]:
    """(lemmas, gloss) of every noun that can be drawn, names a class, and starts with a known word.

    Raises:
        MissingDictionary: WordNet's data files are not in `folder`.
    """
    for line in _lines(folder, "data.noun"):
        if " @i " in line:  # one person, one place: not a class
            continue
        names, file, gloss = entry(line)
        if file in NOUN_FILES and all(word in known for word in names[0].split()):
            yield names, gloss


def entry(line: str) -> tuple[list[str], str, str]:
    """One line of a data file (wndb(5)) -> lemmas, lexicographer file, gloss up to the first semicolon."""
    data, _, gloss = line.partition("|")
    fields = data.split()
    count = int(fields[3], 16)
    names = [name.replace("_", " ").lower() for name in fields[4 : 4 + 2 * count : 2]]
    return names, fields[1], gloss.split(";")[0].strip().lower()


def lemmas(folder: Path) -> frozenset[str]:
    """Every noun, verb and adjective. Raises MissingDictionary."""
    return frozenset(
        line.split(" ", 1)[0] for part in ("noun", "verb", "adj") for line in _lines(folder, f"index.{part}")
    )


def _lines(folder: Path, name: str) -> Iterator[str]:
    """The lines of a dictionary file, without the licence at its top."""
    if not (folder / name).exists():
        raise MissingDictionary(f"no WordNet in {folder}; install it with: apt-get install wordnet-base")
    return (line for line in (folder / name).read_text(encoding="utf-8").splitlines() if not line.startswith(" "))
