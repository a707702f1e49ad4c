"""Writes short stories for children from a grammar: what tests/golden/stories was trained on, and
text held out.

Everything follows from the seed: the numbers are those of `random.Random.random`, which Python
keeps the same."""

import random
from collections.abc import Callable

NAMES = (
    "Anna Ben Clara Daisy Emil Fay Greta Hugo Ida Jack Kim Lily "
    "Max Nora Otto Pia Rosa Sam Tim Una Vera Will Zoe Tom"
)
ANIMALS = (
    "bear bird bunny cat cow dog duck fox frog hen "
    "horse mouse otter owl pig pony sheep squirrel turtle goat"
)
PEOPLE = "girl boy king queen farmer baker child man woman"
TRAITS = "little small young big old brave curious kind lonely lucky quiet shy silly sleepy strong"
LOOKS = "red blue green yellow shiny round soft heavy new pretty broken strange warm wooden"
PLACES = (
    "park forest garden river village beach farm hill lake market school cave field pond house tree"
)
THINGS = (
    "ball balloon basket bell blanket boat book box cake candle coat cookie crown cup drum feather "
    "flower hat kite key lamp map mirror ring rock rope shell spoon stone toy truck"
)
TOOK = (
    "found took saw lost liked carried made wanted dropped hid "
    "pulled pushed opened shared loved broke fixed bought"
)
WENT = (
    "ran walked jumped laughed cried slept sat played "
    "danced sang waited smiled looked hurried stopped"
)
HOW = (
    "quickly|slowly|happily|quietly|again|all day|for a long time|together|very fast|one more time"
)
WHERE = "in near behind under to by"
LINKS = ", and|, but|, so|because|when|until"
FEELINGS = "happy sad proud scared excited surprised angry tired calm worried"
LESSONS = (
    "sharing makes everyone happy|it is good to ask for help|"
    "being kind is better than being strong|it is important to tell the truth|"
    "patience brings good things|even small ones can do big things"
)


def story(draw: Callable[[], float]) -> str:
    """Returns one story; `draw` gives numbers from 0 to 1."""

    def pick(options: str) -> str:
        found = options.split("|") if "|" in options else options.split()
        return found[int(draw() * len(found))]

    def likely(share: float) -> bool:
        return draw() < share

    def a(word: str) -> str:
        return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"

    def capital(text: str) -> str:
        return text[0].upper() + text[1:]

    name, other = pick(NAMES), pick(NAMES)
    kind, friend = pick(ANIMALS if likely(0.4) else PEOPLE), pick(ANIMALS)
    he, his = pick("she,her he,his it,its").split(",")
    place, thing = pick(PLACES), pick(THINGS)

    def who() -> str:
        return pick(
            f"{name}|{name}|{he}|{he}|the {friend}|the {friend}|{other}|they|{a(pick(ANIMALS))}"
        )

    def what() -> str:
        noun = thing if likely(0.5) else pick(THINGS)
        noun = f"{pick(LOOKS)} {noun}" if likely(0.4) else noun
        return a(noun) if likely(0.4) else f"{pick(f'the the {his}')} {noun}"

    def there() -> str:
        return f"{pick(WHERE)} the {place if likely(0.5) else pick(PLACES)}"

    def clause() -> str:
        found = f"{who()} {pick(TOOK)} {what()}" if likely(0.5) else f"{who()} {pick(WENT)}"
        found = f"{found} {there()}" if likely(0.5) else found
        return f"{found} {pick(HOW)}" if likely(0.2) else found

    def speech() -> str:
        said = pick(
            f"I like your {thing}|Where is my {thing}|Thank you, {name}|Can you help me|"
            f"I am very {pick(FEELINGS)}|Please give me {what()}|Look at {what()}|"
            f"Let us go to the {pick(PLACES)}|Do not be {pick(FEELINGS)}"
        )
        end = "?" if said.startswith(("Where", "Can")) else pick(", , !")
        return f'"{said}{end}" {"asked" if end == "?" else "said"} {who()}.'

    def sentence() -> str:
        if likely(0.25):
            return speech()
        if likely(0.2):
            return f"{capital(who())} was {pick(FEELINGS)} and {pick(FEELINGS)}."
        start = f"{pick('Then|Suddenly|One day|The next day|In the end')}, " if likely(0.3) else ""
        found = f"{clause()}{link if (link := pick(LINKS))[0] == ',' else ' ' + link} {clause()}"
        found = found if likely(0.4) else clause()
        return f"{start}{found if start else capital(found)}."

    opening = pick(
        f"Once upon a time there was {a(pick(TRAITS))} {kind} named {name}.|"
        f"Once upon a time, {a(pick(TRAITS))} {kind} lived {there()}. "
        f"{capital(his)} name was {name}.|"
        f"{name} was {a(pick(TRAITS))} {kind} who lived {there()}.|"
        f"One day, {a(pick(TRAITS))} {kind} named {name} went to the {place}."
    )
    ending = pick(
        f"{name} learned that {pick(LESSONS)}.|"
        f"From that day on, {name} and the {friend} were best friends.|"
        f"They went home and were very {pick(FEELINGS)}. The end."
    )
    lines = [" ".join(sentence() for _ in range(2 + int(draw() * 3))) for _ in range(3)]
    return "\n".join([f"{opening} {lines[0]}", *lines[1:], ending])


def stories(characters: int, seed: int) -> list[str]:
    """Returns stories that have at least this many characters together."""
    draw, found = random.Random(seed).random, []
    while sum(map(len, found)) < characters:
        found.append(story(draw))
    return found


def text(characters: int, seed: int) -> str:
    """Returns stories one behind the other, a line apart."""
    return "\n".join(stories(characters, seed)) + "\n"
