"""typeinst_synth: 118 instructions of a seeded grammar, with the published statistics of TYPEINST, whose list is not available.

Means are 34 words per instruction and 12 quoted words (range 1 to 30). Strata: length of the quoted text, domain, content and
style. All sentences are our own. `typeinst_synth.jsonl` beside this file is what `generate()` gives, and a test compares the two:
another sentence here makes another list, whose scores are not comparable with the old one's.
"""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

from zoo.errors import UserError
from zoo.papers.typescore import instructions as lists
from zoo.papers.typescore.instructions import Instruction
from zoo.papers.typescore.render import STYLES

SHIPPED = "typeinst_synth"  # the name of the list that comes with this package
FILE = Path(__file__).with_name(f"{SHIPPED}.jsonl")


def listed(wanted: str, limit: int = 0) -> list[Instruction]:
    """The instructions of a file, or of the list that comes with this package; the first `limit` of them, or all for 0.

    Raises:
        UserError: no such file, or one with mistakes.
    """
    if not wanted:
        raise UserError(f"wanted is empty; name a file of JSON lines, or {SHIPPED}")
    if limit < 0:
        raise UserError(f"limit={limit} must be a number of instructions, or 0 for all")
    ours = wanted in (SHIPPED, FILE.name) and not Path(wanted).is_file()
    found = lists.read(FILE if ours else wanted)
    return found[:limit] if limit else found


RECORDS = 118
LENGTH_BINS = {
    "1-3": 20,
    "4-8": 32,
    "9-16": 36,
    "17-30": 30,
}  # quoted words -> records; their mean is then about 12 words
CONTENTS = ("words", "digits", "acronym", "punctuation")

_TRIES = 400  # texts drawn for a wanted number of words before any number of the same bin will do
# how often an instruction asks for an attribute of style
_ASKED = {"font": 0.65, "colour": 0.85, "weight": 0.5, "case": 0.45, "placement": 0.7, "material": 0.75}

_SLOTS: dict[str, tuple[str, ...]] = {
    "trade": ("Coopers", "Bakers", "Weavers", "Tanners", "Masons"),
    "bird": ("Heron", "Plover", "Osprey", "Gannet", "Tern"),
    "old_year": ("1386", "1492", "1561", "1647", "1708", "1793", "1862"),
    "new_year": ("1968", "1987", "1999", "2006", "2014", "2021"),
    "few": ("2", "3", "4", "5", "6", "7", "8", "9"),
    "some": ("12", "15", "18", "24", "30", "36", "45"),
    "many": ("120", "150", "240", "365", "480", "750"),
    "morning": ("6", "7", "8", "9"),
    "evening": ("17", "18", "19", "20", "21"),
    "price": ("3.50", "4.20", "7.90", "12.40", "18.00"),
    "goods": ("honey", "rye bread", "goat cheese", "pickled plums", "oat biscuits"),
    "fruit": ("pears", "quinces", "cherries", "apricots", "figs"),
    "street": ("Linden", "Copper", "Saddler", "Orchard", "Cannon"),
    "day": ("Monday", "Tuesday", "Thursday", "Saturday", "Sunday"),
    "month": ("March", "April", "June", "September", "October"),
    "band": ("Velvet Otters", "Paper Moons", "Salt Choir", "Iron Larks", "Night Gardeners"),
    "place": ("town hall", "old cinema", "river stage", "west pavilion", "school gym"),
    "thing": ("effort", "patience", "courage", "kindness", "practice"),
    "name": ("Ada Winter", "Jonas Reed", "Mira Vale", "Tomas Field", "Nora Birch"),
    "colour_of_sea": ("grey", "quiet", "northern", "open"),
}  # fmt: skip

# domain -> content -> texts of one to three words
_SHORT: dict[str, dict[str, tuple[str, ...]]] = {
    "historical": {
        "words": ("Tollgate", "Royal Mint", "{trade} Guild", "Old {bird} Inn", "Granary"),
        "digits": ("Anno {old_year}", "Pier {few}", "Mile {some}", "{old_year}", "Founded in {old_year}"),
        "acronym": ("HMS {bird}", "RMS {bird}", "SS {bird}", "SPQR", "The GNR Depot"),
        "punctuation": ("Hear, hear!", "Halt!", "Customs & Excise", "Who goes there?", "St. Alban's Well"),
    },
    "shop": {
        "words": ("Open", "Fresh Fish", "Warm Bread Daily", "Lamps Mended", "Bicycles"),
        "digits": ("{some} flavours", "Only {price}", "Est. {new_year}", "Aisle {few}", "Two for {price}"),
        "acronym": ("DIY Centre", "VIP Tailor", "BBQ", "TV Repairs", "The LED Loft"),
        "punctuation": ("Sale!", "Keys & Locks", "Nora's Buttons", "Half-price hats", "Sold out!"),
    },
    "street": {
        "words": ("Exit", "{street} Street", "Slow Down", "Mind Wet Paint", "Underpass"),
        "digits": ("Gate {few}", "Tram {some}", "{some}", "Platform {few} North", "Bay {many}"),
        "acronym": ("ATM", "CCTV in Use", "GPS Dead Zone", "EV Charging", "The BRT Stop"),
        "punctuation": ("Stop!", "Left, then right", "No entry!", "{street}-Quay", "Lost? Ask"),
    },
    "motivational": {
        "words": ("Begin", "Stay Curious", "Slow Is Fine", "Rest Well", "Onwards"),
        "digits": ("Day {some}", "{many} sunrises", "1 more page", "{some} brave minutes", "100"),
        "acronym": ("No FOMO", "DIY Hope", "SOS Means Ask", "YES", "Be MVP Kind"),
        "punctuation": ("Breathe.", "Why not?", "Look up!", "You can, today", "Well-done!"),
    },
    "poster": {
        "words": ("Encore", "Lantern Night", "{band} Live", "Free Circus", "Harvest Dance"),
        "digits": ("{month} {some}", "Row {few}", "{new_year} Revue", "Act {few}", "{few} Nights Only"),
        "acronym": ("DJ Magpie", "UFO Cinema", "The FM Ball", "IMAX", "LP Fair"),
        "punctuation": ("Bravo!", "Jazz & Soup", "Ready, steady, sing", "Tonight!", "Who's There?"),
    },
    "document": {
        "words": ("Approved", "Draft Copy", "Final Notice", "Handle With Care", "Receipt"),
        "digits": ("Page {some}", "Form {few}", "Copy {few} of {few}", "{many}", "Ticket {many}"),
        "acronym": ("FAQ", "NDA Enclosed", "ISBN Missing", "PDF Copy", "The CEO"),
        "punctuation": ("Urgent!", "Signed: {name}", "To-do", "Terms & Conditions", "Paid?"),
    },
}  # fmt: skip

# domain -> content -> clauses of four to nine words without marks at their ends; longer texts are several of them
_CLAUSES: dict[str, dict[str, tuple[str, ...]]] = {
    "historical": {
        "words": (
            "bread is owed to travellers",
            "grain is weighed fairly in this hall",
            "the bell tolls for lost sailors",
            "here stood the mill that fed three valleys",
            "no cart shall cross the bridge after nightfall",
            "wool dyed in this yard never fades",
            "all tolls are paid at the river gate",
            "strangers sleep beside the kitchen fire",
            "the lamplighters meet beneath the clock tower",
            "salt and iron came up this road",
            "a candle burns here for the {colour_of_sea} sea",
            "the {bird} sails with the evening tide",
        ),
        "digits": (
            "raised by free masons in {old_year}",
            "rebuilt after the flood of {old_year}",
            "pay {few} pennies for each ox",
            "in {old_year} some {some} ships wintered in this harbour",
            "the garrison counts {many} men and {some} horses",
        ),
        "acronym": (
            "the crew of HMS {bird} drank here",
            "mail for RMS {bird} closes at noon",
            "first class to the coast by GNR express",
            "the SS {bird} carries tea and timber",
            "wardens of the LSWR keep this gate",
        ),
        "punctuation": (
            "the king's own saddler, by appointment",
            "ale, mutton and a dry bed",
            "who steals a sheep, pays for two",
            "God's acre: tread softly here",
        ),
    },
    "shop": {
        "words": (
            "today we sell {goods}",
            "the kettle is on and the stove is warm",
            "every loaf is shaped by hand",
            "bring your own jar and fill it up",
            "ripe {fruit} from the farm next door",
            "please ring the bell for service",
            "we mend what others throw away",
            "taste the {goods} before you buy",
            "ask us about soup of the day",
            "flowers for people who forgot the date",
            "knives sharpened while you wait",
            "the cat is not for sale",
        ),
        "digits": (
            "open from {morning} to {evening} every day",
            "two jars of {goods} for {price}",
            "{some} kinds of {goods} on {few} shelves",
            "family owned since {new_year}",
            "spend {some} and get {few} back",
        ),
        "acronym": (
            "we repair every TV and radio",
            "free USB cable with each lamp",
            "members of the VIP club pay less",
            "DIY classes for absolute beginners",
            "fresh BBQ sauce made in this kitchen",
        ),
        "punctuation": (
            "baker's choice: rye, spelt or oat",
            "don't be shy, come in",
            "hand-made, hand-wrapped, hand-sold",
            "hungry? The soup's ready",
        ),
    },
    "street": {
        "words": (
            "keep left on {street} Street",
            "cyclists dismount before the bridge",
            "this crossing is closed until the spring",
            "please do not feed the pigeons",
            "children play here so drive slowly",
            "the ferry leaves when the lamp turns green",
            "road works ahead of the market square",
            "deliveries through the rear yard only",
            "caution when the cobbles are wet",
            "visitors report to the porter first",
            "no parking in front of the gate",
            "night buses stop across the road",
        ),
        "digits": (
            "bus {some} leaves every {few} minutes",
            "max height {few} metres and {some} centimetres",
            "no parking from {morning} to {evening}",
            "detour of {few} kilometres until {month} {some}",
            "house numbers {some} to {many} turn right",
        ),
        "acronym": (
            "this square is watched by CCTV",
            "EV drivers charge here for free",
            "follow the GPS at your own risk",
            "the BRT line ends at {street} Quay",
            "nearest ATM behind the fountain",
        ),
        "punctuation": (
            "look right, look left, then go",
            "danger: deep water, thin ice",
            "the city's oldest tree: don't climb",
            "lost? Follow the blue line",
        ),
    },
    "motivational": {
        "words": (
            "small steps still move mountains",
            "begin before you feel ready",
            "your {thing} will outlast the storm",
            "the view is earned on foot",
            "nothing grows without a little rain",
            "be the lamp in somebody's corridor",
            "{thing} is a muscle so train it",
            "tomorrow thanks you for what you do now",
            "fall down and then try a new door",
            "let {thing} speak louder than fear",
            "the quiet ones also change the world",
            "finish one thing and breathe",
        ),
        "digits": (
            "{some} minutes of {thing} beat {few} hours of worry",
            "read {some} pages before {evening} tonight",
            "fail {few} times and rise {some}",
            "{many} days make a year of {thing}",
            "one percent better for {many} mornings",
        ),
        "acronym": (
            "send an SOS before you sink",
            "be your own CEO of {thing}",
            "swap FOMO for a quiet walk",
            "your IQ matters less than {thing}",
            "treat every teammate like an MVP",
        ),
        "punctuation": (
            "dream, plan, rest, repeat",
            "it's never too late to learn",
            "doubt less; do more",
            "afraid? Good, that means it matters",
        ),
    },
    "poster": {
        "words": (
            "one night of fire and violins",
            "the {band} return to the {place}",
            "dance until the lanterns burn out",
            "a film about the last lighthouse keeper",
            "puppets and acrobats for all ages",
            "doors open when the sun goes down",
            "come early and bring a blanket",
            "new songs by the {band}",
            "free entry for anyone in costume",
            "an opera sung by the whole village",
            "meet the authors in the {place}",
            "get tickets at the {place}",
        ),
        "digits": (
            "{day} the {some}th of {month} at {evening} hours",
            "{few} stages and {some} bands",
            "seats from {price} in rows {few} to {some}",
            "live at the {place} in {month} {new_year}",
            "only {many} tickets left",
        ),
        "acronym": (
            "DJ Magpie plays until sunrise",
            "as heard on Harbour FM",
            "the UFO film club presents",
            "rare LP records in the {place}",
            "a tale of the FBI and the {band}",
        ),
        "punctuation": (
            "love, laughter & a stolen cello",
            "the critics' darling: don't miss it",
            "sing, stomp, shout, repeat",
            "scared yet? You will be",
        ),
    },
    "document": {
        "words": (
            "please read the terms below",
            "the tenant shall keep the garden tidy",
            "this letter was written by {name}",
            "return the signed copy by {day}",
            "the minutes were approved without changes",
            "all samples must be stored in the dark",
            "we regret the delay of your order",
            "the course was completed with distinction",
            "kindly forward this note to {name}",
            "the bearer may enter the reading room",
            "add the flour and stir until smooth",
            "no part may be copied for sale",
        ),
        "digits": (
            "invoice {many} is due on {month} {some}",
            "total of {price} for {few} items",
            "see table {few} on page {some}",
            "meeting of {month} {some} in room {many}",
            "bake for {some} minutes at {many} degrees",
        ),
        "acronym": (
            "send the PDF to the HR office",
            "the CEO signs every page",
            "answers are listed in the FAQ",
            "this NDA binds both parties",
            "the VAT is already included",
        ),
        "punctuation": (
            "dear {name}, thank you for waiting",
            "subject: repair of the lift",
            "yours sincerely, {name}",
            "note: see the editor's remarks",
        ),
    },
}  # fmt: skip
DOMAINS = tuple(_CLAUSES)

_SCENES: dict[str, tuple[str, ...]] = {
    "historical": (
        "a medieval market square",
        "a harbour full of tall ships",
        "the courtyard of a coaching inn",
        "a railway hall from the age of steam",
        "a blacksmith beside an old bridge",
    ),
    "shop": (
        "a small bakery after rain",
        "a busy hardware store",
        "a grocer stacking crates at dawn",
        "a cosy tea room",
        "a market stall under an awning",
    ),
    "street": (
        "a narrow street with trams",
        "an empty crossing at night",
        "a station during the evening rush",
        "a quiet canal with moored boats",
        "a car park on a roof",
    ),
    "motivational": (
        "a lone runner on a beach",
        "a mountain path into bright clouds",
        "a tidy desk with a plant",
        "a climber below a snowy summit",
        "a child planting a tree",
    ),
    "poster": (
        "a theatre lobby with velvet curtains",
        "a festival meadow with paper lanterns",
        "musicians on a dim stage",
        "an old cinema on a wet evening",
        "a circus ring with an acrobat",
    ),
    "document": (
        "an orderly office with ring binders",
        "a reading room with green lamps",
        "a kitchen table covered with letters",
        "a laboratory bench with glass bottles",
        "a lawyer's study with a fountain pen",
    ),
}  # fmt: skip
_MEDIA = (
    "a photograph",
    "a watercolour",
    "an oil painting",
    "a digital illustration",
    "a film still",
    "a pencil drawing",
)
_CARRIERS: dict[str, tuple[str, ...]] = {
    "": ("a sign", "a panel", "a board"),
    "paper": ("a sheet of paper", "a paper notice", "a large paper scroll"),
    "wood": ("a wooden board", "a wooden sign", "a panel of weathered wood"),
    "stone": ("a stone slab", "a smooth stone tablet", "a stone wall"),
    "brick": ("a brick wall", "an old brick facade", "a painted brick wall"),
    "metal": ("a metal plate", "a brushed metal sign", "a sheet of metal"),
    "cloth": ("a cloth banner", "a hanging cloth", "a woven cloth flag"),
}
_PLACES: dict[str, tuple[str, ...]] = {
    "top": ("at the top", "along the top"),
    "bottom": ("at the bottom", "along the bottom"),
    "left": ("on the left", "at the left edge"),
    "right": ("on the right", "at the right edge"),
    "centre": ("in the centre", "in the middle"),
}
_LETTERS = {"capitals": "capital letters", "lowercase": "lowercase letters", "": "letters"}
# {scene} with its article, {Scene} as a sentence begins, {carrier} what is written on, {quoted}, {style} "in red letters", {place}
_FRAMES = (
    "{A_medium} of {scene}, where {carrier} reads {quoted} {style}{place}.",
    "{Scene} as {a_medium}. The text {quoted} stands {style}{place} on {carrier}.",
    "{Carrier} says {quoted}{place}, written {style}. Behind it is {scene}; {a_medium}.",
    "Make {a_medium} of {scene}, with {quoted} lettered {style}{place} on {carrier}.",
    "{Scene}. Someone put up {carrier} that says {quoted} {style}{place}. {A_medium}.",
    "{A_medium}: {scene}, beside it {carrier} with the words {quoted} {style}{place}.",
)
_JOIN = {"words": (" and ",), "punctuation": (". ", "! ", ", ", "; ")}
_QUOTES = ('""',) * 8 + ("“”", "''")


def content(text: str) -> str:
    """The first of `CONTENTS` that a text shows, of digits, acronym, punctuation; else "words"."""
    if re.search(r"\d", text):
        return "digits"
    if re.search(r"\b[A-Z]{2,}\b", text):
        return "acronym"
    return "punctuation" if re.search(r"[^\w\s]", text) else "words"


def generate(seed: int = 0) -> list[Instruction]:
    """The 118 instructions; those of seed 0 are the ones shipped, the same with every Python."""
    rng = Random(seed)
    plan: list[tuple[str, int, str, str]] = []
    for name, count in LENGTH_BINS.items():
        low, high = (int(x) for x in name.split("-"))
        for k in range(count):
            i = len(plan)
            # one further every 12, or a domain would meet two contents only
            plan.append((name, low + k % (high - low + 1), DOMAINS[i % len(DOMAINS)], CONTENTS[(i + i // 12) % 4]))
    plan.sort(key=lambda _: rng.random())
    found: list[Instruction] = []
    texts: set[str] = set()
    for i, (length_bin, words, domain, kind) in enumerate(plan):
        pieces = _pieces(rng, length_bin, words, domain, kind, texts)
        text = " ".join(pieces)
        texts.add(text)
        style = _style(rng, text)
        instruction = _instruction(rng, domain, pieces, style)
        found.append(Instruction(f"synth-{i + 1:03d}", instruction, text, pieces, style, length_bin, domain))
    return found


def _pick(rng: Random, values: tuple[str, ...]) -> str:
    # by `random()` alone, the one method whose numbers Python promises to keep
    return values[int(rng.random() * len(values))]


def _fill(rng: Random, template: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda slot: _pick(rng, _SLOTS[slot[1]]), template)


def _first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _pieces(rng: Random, length_bin: str, words: int, domain: str, kind: str, taken: set[str]) -> tuple[str, ...]:
    """The quoted text of one record, in one piece or two: `words` long where that is found, else any length of its bin."""
    low, high = (int(x) for x in length_bin.split("-"))
    spare: tuple[str, ...] = ()
    for _ in range(_TRIES):
        if high <= 3:
            pieces: tuple[str, ...] = (_fill(rng, _pick(rng, _SHORT[domain][kind])),)
        else:
            pieces = _sentences(rng, domain, kind, words)
        text = " ".join(pieces)
        if content(text) != kind or text in taken:
            continue
        if len(text.split()) == words:
            return pieces
        if low <= len(text.split()) <= high:
            spare = pieces
    if not spare:
        raise RuntimeError(f"the grammar has no text of {length_bin} words, {domain}, {kind}")
    return spare


def _sentences(rng: Random, domain: str, kind: str, words: int) -> tuple[str, ...]:
    """Clauses, each at most once, until there are `words` words or more; one of them at least is of `kind`."""
    plain = list(_CLAUSES[domain]["words"])
    special = plain if kind == "words" else list(_CLAUSES[domain][kind])
    glue = _JOIN["words"] if kind == "words" or rng.random() < 0.2 else _JOIN["punctuation"]
    extra = glue is _JOIN["words"]  # "and" is a word too
    parts: list[str] = []
    while sum(len(p.split()) + extra for p in parts) - extra < words - 2:
        pool = special if special and (not parts or rng.random() < 0.4) else plain
        parts.append(_fill(rng, pool.pop(int(rng.random() * len(pool)))))
        if not plain:
            break
    parts.sort(key=lambda _: rng.random())
    text = _first(parts[0])
    cut = 0  # where a second piece may begin
    for part in parts[1:]:
        joint = _pick(rng, glue)
        if joint[0] in ".!":
            text += joint
            cut = len(text)
            text += _first(part)
        else:
            text += joint + part
    if kind == "punctuation" and rng.random() < 0.6:
        text += _pick(rng, (".", "!"))
    if cut and rng.random() < 0.5:
        return text[: cut - 1], text[cut:]
    return (text,)


def _style(rng: Random, text: str) -> dict[str, str]:
    style = {}
    for attribute, share in _ASKED.items():
        asked, value = rng.random() < share, _pick(rng, STYLES[attribute])
        changed = text.upper() if value == "capitals" else text.lower()
        # plain weight is never asked for, nor a case that could not be told from the text's own
        if asked and value != "regular" and not (attribute == "case" and changed == text):
            style[attribute] = value
    return style


def _instruction(rng: Random, domain: str, pieces: tuple[str, ...], style: dict[str, str]) -> str:
    marks = _pick(rng, _QUOTES)
    if marks == "''" and any("'" in piece for piece in pieces):
        marks = '""'  # an apostrophe inside of single quotes could end them
    quoted = " and below ".join(f"{marks[0]}{piece}{marks[1]}" for piece in pieces)
    letters = (style.get("weight", ""), style.get("colour", ""), style.get("font", ""), _LETTERS[style.get("case", "")])
    scene = _pick(rng, _SCENES[domain])
    carrier = _pick(rng, _CARRIERS[style.get("material", "")])
    medium = _pick(rng, _MEDIA)
    return _pick(rng, _FRAMES).format(
        a_medium=medium,
        A_medium=_first(medium),
        scene=scene,
        Scene=_first(scene),
        carrier=carrier,
        Carrier=_first(carrier),
        quoted=quoted,
        style="in " + " ".join(word for word in letters if word),
        place=f" {_pick(rng, _PLACES[style['placement']])}" if "placement" in style else "",
    )
