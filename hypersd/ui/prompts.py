"""Prompts to begin with: the styles the embedded model was taught, and ideas that suit a picture of 128 px."""

from __future__ import annotations

STYLES = ("fluent", "noto", "twemoji", "fluent flat", "noto classic", "emojione", "firefox", "streamline")

EXAMPLES = (  # the first is what the app opens with
    "a blue heart, twemoji style",
    "a smiling face with sunglasses, noto style",
    "a cactus in a pot, noto style",
    "a rocket, fluent style",
    "a happy cat, fluent style",
    "a slice of pizza, noto style",
)

SUBJECTS = (
    "a happy cat", "a cat with heart eyes", "a laughing face", "a sad face", "a face with sunglasses", "a sleepy face",
    "a friendly robot", "a ghost", "a unicorn", "a fox", "a panda", "a penguin", "an owl", "a frog", "a koala",
    "a tiger", "a hamster", "a snail", "an octopus", "a tropical fish", "a whale", "a crab", "a ladybug", "a butterfly",
    "a honeybee", "a slice of pizza", "a hamburger", "a bowl of noodles", "sushi", "a doughnut", "a cupcake",
    "an ice cream cone", "a birthday cake", "a cup of hot coffee", "a glass of red wine", "a strawberry", "a pineapple",
    "a slice of watermelon", "an avocado", "a red apple", "a banana", "a carrot", "a mushroom", "a cactus",
    "a sunflower", "a tulip", "a four leaf clover", "a palm tree", "a christmas tree", "a rainbow", "a full moon",
    "a snowman", "a volcano", "a tornado", "a wave", "a shooting star", "a red heart", "a purple heart",
    "a broken heart", "a rocket", "a flying saucer", "a sailboat", "a steam locomotive", "a red car", "a bicycle",
    "an airplane", "a lighthouse", "a castle", "a house with a garden", "a tent", "a camera", "an alarm clock",
    "a light bulb", "a pair of glasses", "a crown", "a top hat", "a backpack", "an umbrella", "a guitar", "a violin",
    "a drum", "an artist palette", "a soccer ball", "a basketball", "a trophy", "a chess pawn", "a gem stone", "a key",
    "a hammer", "a magnet", "a microscope", "a telescope", "a balloon", "a wrapped gift", "a teddy bear",
    "a jack-o-lantern",
)  # fmt: skip


def surprise(dice: int) -> str:
    """One of all subject and style pairs; any whole number picks one, and numbers in a row change both words.

    >>> surprise(0)
    'a happy cat, fluent style'
    """
    return f"{SUBJECTS[dice % len(SUBJECTS)]}, {STYLES[(dice // len(SUBJECTS) + dice) % len(STYLES)]} style"
