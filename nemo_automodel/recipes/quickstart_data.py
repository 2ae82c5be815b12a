"""Synthetic data for the ``quickstart`` command: a customer's order message to a one-line JSON record.

The record names the customer, the item as the message has it (in its number), the quantity as an integer, the colour
(``null`` when the message gives none) and the weekday of delivery. Many messages also hold distractors (another name,
weekday, number or colour, or a quantity corrected in mid-sentence), so copying by position does not work.

Training and held-out examples share no phrasing (message template, distractor, time of day), customer name, item,
colour or spelled-out number. Both draw on the seven weekdays, and on the idioms in ``QUANTITY_IDIOMS``.
"""

import json
import random
import re
from typing import Any

SYSTEM_PROMPT = "Turn the order into JSON: name, item, quantity, colour, day."
COLOUR_SHARE = 0.65  # of messages that name one
FIELDS = ("name", "item", "quantity", "colour", "day")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# (before a noun, standing alone, value): the only quantities that both splits use
QUANTITY_IDIOMS = (("a dozen", "a dozen", 12), ("half a dozen", "half a dozen", 6), ("a couple of", "a couple", 2))


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


NUMBER_WORDS = _split(
    "zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, "
    "fifteen, sixteen, seventeen, eighteen, nineteen, twenty"
)
IRREGULAR_PLURALS = {"knife": "knives", "scarf": "scarves", "shelf": "shelves"}

TRAIN: dict[str, tuple[Any, ...]] = {
    "names": _split(
        "Anna, Ben, Carla, David, Elena, Frank, Grace, Hassan, Irene, Jack, Karen, Liam, Maria, Nathan, Olga, "
        "Paul, Rachel, Samuel, Tina, Victor, Wendy, Yusuf, Zoe, Amir, Bianca, Colin, Diana, Emil, Fatima, "
        "George, Helen, Ivan, Julia, Kenji, Laura, Martin, Nina, Oscar, Petra, Robert, Sofia, Thomas, Ursula, "
        "Walter, Yasmin, Aisha, Bruno, Clara, Dmitri, Esther, Adam, Brenda, Cyrus, Doris, Eric, Fiona, Gavin, "
        "Hilda, Igor, Joanna, Kofi, Lucia, Mona, Nora, Omar, Pablo, Rita, Stefan, Ulrich, Zara, Abel, Beatriz, "
        "Caleb, Dora, Edgar, Farah, Gloria, Henrik, Imani, Jorge, Katya, Lorenzo, Mei, Nikhil, Odette, Philip, "
        "Ramona, Sven, Tobias, Umar, Vincent, Winston, Yara, Zachary, Anders, Brigitte, Chen, Dunja, Ernesto, "
        "Freya, Gideon, Harriet, Ismail, Jolanda, Kasper, Lydia, Mateo, Nadia, Orlando, Paula, Raj, Selma, Tariq"
    ),
    "items": _split(
        "mug, lamp, chair, cushion, candle, vase, blanket, towel, plate, bowl, basket, rug, curtain, pillow, "
        "notebook, pen, scarf, hat, jacket, umbrella, backpack, clock, mirror, knife, brush, box, bench, dress, "
        "kettle, apron, coffee table, picture frame, tea pot, desk lamp, wine glass, garden chair, lunch box, "
        "water bottle, shower curtain, paint brush, school bag, door mat, bread knife, phone case, desk, table, "
        "fork, jug, saucer, grill, oven, freezer, heater, fan, radio, speaker, tablet, keyboard, printer, scanner, "
        "cable, charger, adapter, lantern, torch, poster, statue, planter, trowel, rake, spade, hose, sprinkler, "
        "gnome, hammock, parasol, swing, kite, ball, racket, helmet, skateboard, scooter, bicycle, saddle, pump, "
        "tyre, lock, chain, corkscrew, grater, peeler, whisk, ladle, spatula, sieve, colander, timer, scale, "
        "mitten, sock, shoe, boot, sandal, slipper, shirt, skirt, coat, cardigan, jumper, brooch, ring, bracelet, "
        "necklace, earring, watch, purse, suitcase, trunk, hanger, hook, nail, screw, bolt, drill, saw, wrench, "
        "chisel, marker, crayon, eraser, ruler, folder, binder, envelope, stamp, calendar, magazine, puzzle, doll, "
        "puppet, drum, flute, trumpet, piano, microphone, hairbrush, razor, sponge, broom, mop, duster, candle holder, "
        "coat hook, bird feeder, bicycle bell, soup bowl, salad fork, travel mug, wall clock, sun hat, rain coat, "
        "pencil case, computer mouse pad, fishing rod, tennis racket, bath mat, bed sheet"
    ),
    "colours": _split(
        "red, blue, green, black, white, yellow, grey, brown, pink, purple, silver, dark blue, light green, "
        "pale pink, bright red, dark grey"
    ),
    "numbers": (1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 13, 15, 17, 18, 20),
    "when": ("on {day}", "by {day}", "this {day}", "on {day} morning", "for {day}", "on {day} afternoon", "next {day}"),
    "others": _split("Otto, Lena, Marcus, Ruth, Felix, Judith"),
    "distractors": (
        *("My friend {other} told me about your shop.", "I will be away on {other_day}."),
        *("We live at number {number}, second door.", "My customer number is {number}."),
        *("The {other_colour} one I bought last year is still lovely.", "{other_day} does not work for us."),
        *("If I am out, {other} will open the door.", "It is a present for {other}."),
        *("I paid with the card ending in {number}.", "Not {other_colour} again, please!"),
    ),
    "templates": (
        "Hi, I'd like {order} delivered {when}. Thanks, {name}",
        *("Hello, this is {name}. Please send me {order} {when}.", "{name} here. Could I get {order} {when}?"),
        "Can I order {order}? I need everything {when}. {name}",
        "Please put me down for {order}, {when} if possible. Name is {name}.",
        "Good morning! My name is {name} and I want to buy {order}. Delivery {when}, please.",
        *("I need {order} {when}. Cheers, {name}", "{order} please, to arrive {when}. The name's {name}."),
        *("Order for {name}: {order}, {when}.", "Hey there, {name} speaking, I'm after {order}. Can they come {when}?"),
        "We're looking for {order} and would like to have it {when}. Kind regards, {name}",
        "Do you have {items}? If so I'll take {qty}, {when}. {name}",
        "I love your {items}! {qty} for me please, {when}. - {name}",
        "About the {items}: I want {qty}. Bring them {when}. {name} is the name.",
        *("{when} I'd like to receive {order}. Best, {name}", "{when}, please: {order}. Regards, {name}"),
        "Are {items} in stock? {name} would like {qty} {when}.",
        "Could you set aside {order} for {name}? Drop off {when}.",
        "This is an order from {name}. {order}. Deliver {when}.",
        *("Please add {order} to my account ({name}) and deliver {when}.", "Send {order} to {name} {when}."),
        *("I'm {name}. {qty} of the {items}, please, {when}.", "It's {name}. I'd love to have {order} here {when}."),
        *("Need: {order}. When: {when}. Who: {name}.", "new order - {order} - {when} - {name}"),
        "My order is {order}. My name is {name}. I need it {when}.",
        "Hi, {name} again! Same as always, {order} {when}.",
        "{name} wants {order}, and the courier should come {when}.",
        "Just {order} for me, thanks. {when} is fine. {name}",
        "Is it possible to get {order} {when}? Many thanks from {name}",
        "Can you bring {order} round {when}? Ask for {name}.",
        "I first said {wrong}, but make it {order} {when}. {name}",
        "Not {wrong}, sorry: {order} {when}, please. {name}",
        "{name} here, I changed my mind: instead of {wrong} I want {order} {when}.",
        "I'd like {items}, {wrong} - no, {qty} of them - {when}. Thank you! {name}",
        "Evening! Put {order} on the van {when}, customer {name}.",
        *("For my kitchen I want {order}. {when} suits me. Yours, {name}", "A quick one from {name}: {order}, {when}."),
        "The {items} look great, so {name} will have {qty}, {when}.",
        "Deliver {when} please. I want {order}. Signed {name}",
    ),
}

HELDOUT: dict[str, tuple[Any, ...]] = {
    "names": _split(
        "Alice, Boris, Chloe, Daniel, Emma, Gustav, Hannah, Isaac, Jasmine, Kevin, Leila, Miguel, Noah, Priya, "
        "Quentin, Rosa, Simon, Tamara, Vera, William, Xavier, Naomi, Peter, Monica"
    ),
    "items": _split(
        "pan, tray, stool, sofa, ladder, bucket, teacup, sweater, glove, wallet, shelf, spoon, drawer, jar, "
        "tent, belt, baking dish, flower stand, toy train, cake tin, laptop sleeve, tool rack, guitar strap"
    ),
    "colours": _split("orange, turquoise, beige, gold, maroon, violet, navy, cream, deep violet, soft orange"),
    "numbers": (7, 11, 14, 16, 19),
    "when": ("on {day} evening", "before noon on {day}", "this coming {day}", "on {day} at lunchtime"),
    "others": _split("Stella, Hugo, Ingrid, Ravi"),
    "distractors": (
        *("My neighbour {other} recommended you.", "We are closed on {other_day}."),
        *("Ring bell {number} on arrival.", "The {other_colour} version was not for me."),
        *("My colleague {other} can sign for the parcel.", "{other_day} would be too late."),
    ),
    "templates": (
        "Hello! Might I have {order} shipped {when}? With thanks, {name}",
        "{name} calling about an order: {order}, needed {when}.",
        "Please reserve {order} and drop everything off {when}. You can reach me as {name}.",
        "I was hoping you could deliver {order} {when}. Warmly, {name}",
        *("Got any {items}? {name} could use {qty} {when}.", "Shopping list from {name}: {order}. Must arrive {when}."),
        "Our office would like {order}. Please come {when} and ask for {name}.",
        "{when} would be perfect for my delivery of {order}. All the best, {name}",
        "Those {items} are beautiful. I'll buy {qty}. Ship {when}, to {name}.",
        "I asked for {wrong} earlier; please change that to {order}, {when}. {name}",
        "Good afternoon, you're speaking with {name}, and I wish to purchase {order}, arriving {when}.",
        "How about {order} {when}? Send the invoice to {name}.",
        "Scrap {wrong}: we want {order} {when}. Greetings from {name}",
    ),
}


def plural(item: str) -> str:
    """Return the plural of an item of this module's lists."""
    head, _, last = item.rpartition(" ")
    ending = "es" if last.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{head} {IRREGULAR_PLURALS.get(last, last + ending)}".strip()


def _quantity(split: dict[str, tuple[Any, ...]], rng: random.Random) -> tuple[str, str, int]:
    """Draw a quantity: its words before a noun, its words standing alone, and its value."""
    if rng.random() < 0.25:
        return rng.choice(QUANTITY_IDIOMS)
    value = rng.choice(split["numbers"])
    word = NUMBER_WORDS[value] if rng.random() < 0.75 else str(value)
    return word, word, value


def _example(split: dict[str, tuple[Any, ...]], template: str, rng: random.Random) -> dict[str, Any]:
    """Fill one template with values drawn from a split and pair it with its record."""
    name, item, day = rng.choice(split["names"]), rng.choice(split["items"]), rng.choice(DAYS)
    colour = rng.choice(split["colours"]) if rng.random() < COLOUR_SHARE else None
    before_noun, alone, quantity = _quantity(split, rng)
    wrong = rng.choice([w for w in split["numbers"] if w != quantity])
    noun = thing = item if quantity == 1 and "{order}" in template else plural(item)
    if colour:
        noun = f"{colour} {noun}" if rng.random() < 0.7 else f"{noun} in {colour}"
    text = template.format(
        order=f"{before_noun} {noun}",
        items=noun,
        qty=alone,
        wrong=NUMBER_WORDS[wrong],
        when=rng.choice(split["when"]).format(day=day),
        name=name,
    )
    if rng.random() < 0.4:
        distractor = rng.choice(split["distractors"]).format(
            other=rng.choice(split["others"]),
            other_day=rng.choice([d for d in DAYS if d != day]),
            other_colour=rng.choice([c for c in split["colours"] if c != colour]),
            number=rng.choice([n for n in range(21, 99) if n != quantity]),
        )
        text = (
            f"{distractor} {text}" if rng.random() < 0.5 else f"{text}{'' if text[-1] in '.?!' else '.'} {distractor}"
        )
    text = re.sub(r"(?:^|[.?!] )[a-z]", lambda start: start[0].upper(), text)
    record = dict(zip(FIELDS, (name, thing, quantity, colour, day), strict=True))
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": text},
            {"role": "assistant", "content": json.dumps(record, separators=(",", ":"))},
        ]
    }


def _examples(split: dict[str, tuple[Any, ...]], count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Return ``count`` examples with distinct messages, using every template about equally often."""
    rows: dict[str, dict[str, Any]] = {}
    order: list[str] = []
    while len(rows) < count:
        order = order or rng.sample(split["templates"], len(split["templates"]))
        row = _example(split, order.pop(), rng)
        rows.setdefault(row["messages"][1]["content"], row)
    return list(rows.values())


def train_examples(count: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """Return ``count`` distinct training examples; the same count and seed give the same list."""
    return _examples(TRAIN, count, random.Random(f"train-{seed}"))


def heldout_examples(count: int = 120, seed: int = 0) -> list[dict[str, Any]]:
    """Return ``count`` distinct held-out examples, in phrasings and values that training never shows."""
    return _examples(HELDOUT, count, random.Random(f"heldout-{seed}"))


def exact_match(prediction: str, reference: str) -> bool:
    """Whether the prediction is one JSON object, and nothing else, equal to the reference record.

    Spaces around a string count for nothing: a tokenizer's words begin with one, and models copy whole words.
    """
    try:
        predicted, expected = json.loads(prediction), json.loads(reference)
    except (ValueError, RecursionError):
        return False
    # compared as text, because in Python 1 == 1.0 == True
    return isinstance(predicted, dict) and _canonical(predicted) == _canonical(expected)


def _canonical(record: dict[str, Any]) -> str:
    trimmed = {key: value.strip() if isinstance(value, str) else value for key, value in record.items()}
    return json.dumps(trimmed, sort_keys=True)
