"""Writes the quickstart's data: customers' free-text orders, each answered by one line of JSON.

`python -m raytune_ft.quickstart.generator [FOLDER]` writes the same bytes every time. Nothing of the test set can be
remembered from training: its names, items, colours, quantities, cities and sentences occur nowhere in `orders.jsonl`,
so a right answer has been read out of the customer's text. The pool also carries a known number of
faults (duplicates, empty answers, mojibake, stray whitespace) for the prepare stage to find.

SmolLM2's tokenizer cuts each of these first names, items, colours and cities into the same pieces after a quotation
mark as after a space, so that an answer can be copied piece by piece. Other words (`rulers` is one piece after a space,
three after a quotation mark) have to be spelt anew, and a model of this size often spells them wrong.
"""

import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, TypeVar

SEED = 20
POOL_FILE = "orders.jsonl"
TEST_FILE = "orders_test.jsonl"
DATA_FOLDER = Path(__file__).parent / "data"

HUES = "red blue green yellow purple orange pink brown grey teal violet turquoise beige gold crimson olive"
"""Colours are a shade and a hue ("dark red"): training and test share the hues, not the shades."""

FIELDS = ("name", "item", "colour", "quantity", "city")
SYSTEM_MESSAGE = "Answer with one line of JSON, keys name, item, colour, quantity, city."

SOUND_ROWS = 700
"""Pool rows with nothing wrong, no two alike."""
DUPLICATES = 20
"""Pool rows that repeat a sound row letter for letter."""
EMPTY_ANSWERS = 6
"""Pool rows whose assistant message is empty: nothing can be learned from them."""
MOJIBAKE = 6
"""Pool rows whose UTF-8 was read as Latin-1 ("MalmÃ¶"): mended, they are sound rows like no other."""
STRAY_WHITESPACE = 6
"""Pool rows with control characters and blanks around the text: mended, they are sound rows like no other."""
POOL_ROWS = SOUND_ROWS + DUPLICATES + EMPTY_ANSWERS + MOJIBAKE + STRAY_WHITESPACE
TEST_ROWS = 104


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class Row(TypedDict):
    """One line of a data file; `wording` names the sentence that the order was put in."""

    messages: list[Message]
    wording: str


Card = TypeVar("Card")


@dataclass(frozen=True)
class Vocabulary:
    """What the slots of a sentence are filled from; a customer's name is a first and a last name drawn apart."""

    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    items: tuple[str, ...]
    colours: tuple[str, ...]
    quantities: tuple[int, ...]
    cities: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(" ".join(phrase.split()) for phrase in text.split(","))


def _shades(shades: str) -> tuple[str, ...]:
    return tuple(f"{shade} {hue}" for shade in shades.split() for hue in HUES.split())


def _numbered(prefix: str, wordings: Sequence[str]) -> dict[str, str]:
    return {f"{prefix}-{number:02d}": wording for number, wording in enumerate(wordings, start=1)}


TRAINING_VOCABULARY = Vocabulary(
    first_names=_words("""
        Alice Amir Anna Arthur Ben Carla Cedric Daniel Daphne David Edward Emil Fiona Frank George Hamid Ines Jack
        Jasmine Laila Louis Martin Maya Neil Olga Paula Peter Renée Robert Samuel Simon Thomas Victor Alicia Anita
        Ariel Audrey Candice Chloé Darius Desmond Dimitri Donna Eileen Enrique Evelyn Freya Gareth Genevieve Gina Gwen
        Hector Henrik Hilda Ingrid Irma Ismail Jamal Jocelyn Josephine Kirsten Magnus Mahmoud Marcel Marjorie Marta
        Mathilda Noel Nuria Octavia Penelope Phoebe Quentin Ramona Reginald Roberta Roxanne Salma Sergio Sigrid Silvia
        Stella Suresh Susanna Tabitha Tamara Terence Theresa Valerie Vanessa Virginia Wanda Wilfred Winifred Yasmin
        Yolanda Yvonne Angus Barnaby Bob Callum Charles Clive Damian Deirdre Eunice Gene Hank James Janice Jeff John
        Josh Kyle Leila Lily Lorna Luke Maria Marina Matthew Meredith Nick Pauline Petra Prudence Rhoda Rory Sadie
        Silas Stephen Tanya Tim Tom Vince Yuri"""),
    last_names=_words("""
        Abbott Adler Ahmed Archer Bailey Baker Barnes Becker Bennett Blake Boyd Brooks Butler Carter Castillo Chen
        Clarke Collins Cooper Costa Cruz Dawson Dixon Doyle Ellis Evans Fischer Fletcher Ford Foster Garcia Gibson
        Graham Grant Hansen Harper Hayes Hughes Hunt Iyer Jensen Jordan Keller Khan Kim Lambert Larsen Lewis Lopez
        Marsh Mason Mehta Meyer Mills Moreno Morris Murphy Nelson Novak Owens Parker Patel Porter Price Quinn Reed
        Reyes Rossi Russo Sanders Schmidt Shaw Silva Singh Sutton Tanaka Taylor Turner Vance Walsh Watson Weber Wood
        Young Abernathy Almeida Appleby Ashdown Barlow Bellamy Bergstrom Blackwood Bradshaw Buchanan Cardenas Chaudhry
        Cochrane Crawford Dahl Desai Donovan Eastwood Eklund Espinoza Fernandes Forsyth Gallagher Gerhardt Gonzalez
        Haddad Hartmann Hemingway Hoffmann Huang Ivanova Johansson Kempner Kowalski Lachlan Langley Lindqvist
        Macdonald Maldonado Matsumoto McCarthy Montgomery Mukherjee Navarro Nicholson Oconnor Ortega Paganini
        Papadakis Petrov Prescott Ramirez Redmond Rosenthal Salazar Schneider Sorensen Stavros Svensson Thackeray
        Tremblay Valdez Villanueva Warwick Wilkinson Yamamoto Zhang"""),
    items=_phrases("""
        mugs, backpacks, umbrellas, chairs, bar stools, picture frames, bookends, vases, bath mats, scarves, beanies,
        hoodies, raincoats, sandals, belts, water bottles, soup bowls, salt shakers, cutting boards, storage bins,
        coat hooks, door mats, bed sheets, camp chairs, kettles, toasters, watering cans, bird feeders, staplers,
        ring binders, party hats, tablecloths, dog leads, cat beds, key rings, phone cases, hairbrushes,
        air mattresses, axes, bagels, bandages, banjos, bar carts, barometers, bath sponges, beakers, bedside tables,
        bibs, blazers, blenders, blinds, board games, bonnets, bow ties, bread bins, briefcases, buckles, buttons,
        can openers, car seats, carafes, chandeliers, clogs, combs, compasses, cookbooks, corsets, cots, cradles,
        crowbars, darts, door handles, doughnut pans, drawers, easy chairs, egg timers, espresso cups, fedoras,
        fishing rods, flags, flannels, flasks, flip charts, flutes, fondue sets, footballs, frisbees, funnels,
        garlands, globes, graters, hair clips, handbags, handkerchiefs, hourglasses, ice skates, inkwells, jam jars,
        jigsaws, jugs, juicers, jumpers, karaoke machines, kimonos, ladders, lampposts, lanyards, leggings,
        letter openers, light bulbs, lockers, loudspeakers, mandolins, masks, megaphones, metronomes, moccasins, mops,
        mousetraps, nightgowns, nutcrackers, oars, oboes, oil lamps, padlocks, pajamas, parkas, pendants, petticoats,
        photo albums, pitchforks, ponchos, pot holders, prams, projectors, quivers, racquets, rocking horses,
        roller blinds, rolling pins, sashes, screwdrivers, serving trays, skillets, snow globes, sofas, soup spoons,
        stencils, stockings, stopwatches, sun hats, tambourines, tankards, thimbles, tiaras, ties, toolboxes,
        toothbrushes, torches, tripods, trombones, trophies, tumblers, tunics, turntables, typewriters, unicycles,
        vests, violins, walking sticks, wall hooks, weather vanes, whistles, window boxes, wine racks, workbenches,
        wrenches, zithers"""),
    colours=_shades("dark bright soft warm plain medium pure matte rusty antique rich"),
    quantities=tuple(number for number in range(2, 200) if number % 3),
    cities=_phrases("""
        Boston, Osaka, Accra, Chicago, Oxford, Norwich, Zagreb, Tampere, Uppsala, Rotterdam, Utrecht, Antwerp, Ghent,
        Nantes, Marseille, Turin, Valencia, Porto, Hanoi, New York, San Diego, Zürich, Córdoba, Montréal, Düsseldorf,
        Tromsø, Aachen, Abidjan, Alicante, Almaty, Amman, Arequipa, Asheville, Asmara, Astana, Augsburg, Bari, Beirut,
        Belgrade, Bordeaux, Cagliari, Caracas, Casablanca, Catania, Colombo, Colchester, Coventry, Dakar,
        Dar es Salaam, Des Moines, Doha, Doncaster, Dortmund, Duisburg, Durban, Eindhoven, El Paso, Erfurt, Essen,
        Fargo, Freetown, Gothenburg, Groningen, Guadalajara, Guayaquil, Haarlem, Harare, Huddersfield, Innsbruck,
        Inverness, Ipswich, Islamabad, Jacksonville, Kigali, Kinshasa, Kobe, Kuala Lumpur, La Paz, Lausanne, Limerick,
        Limoges, Linz, Ljubljana, Lucerne, Maastricht, Madison, Magdeburg, Managua, Maputo, Maribor, Marrakesh,
        Medellin, Messina, Middlesbrough, Modena, Mombasa, Monterrey, Montpellier, Muscat, Nicosia, Northampton,
        Oaxaca, Oldenburg, Olomouc, Ostrava, Padua, Pamplona, Parma, Perugia, Peterborough, Plovdiv, Pune,
        Punta Arenas, Regensburg, Rosario, Rostock, Salamanca, Salford, Sapporo, Scranton, Shrewsbury, Siena, Skopje,
        Spokane, St Albans, Stockport, Strasbourg, Stuttgart, Tashkent, Tbilisi, Tel Aviv, Trieste, Vigo, Wichita,
        Wroclaw, Yerevan, Yokohama, Zaragoza"""),
)

TEST_VOCABULARY = Vocabulary(
    first_names=_words("""
        Astrid Bianca Caleb Camille Dora Dylan Elliot Fatima Heidi Henry Ida Imogen Jacob Jonas Lena Lydia Mabel Malik
        Nils Rita Selma Theo Tessa Xavier Yusuf Agatha Arlene Bertha Bonnie Cathy Chris Cody Darcy Elise Fred Gerard
        Helga Jane Jean Jim Joseph Ken Lance Leon Lois Lucia Madeline Marie Mary Maxine Michael Patsy Peggy Phil
        Reggie Richard Rufus Sheila Stan Sven Thelma Tina Travis William Yvette"""),
    last_names=_words("""
        Alvarez Anders Atkins Banks Barton Bauer Bishop Bowen Briggs Burke Calder Chandra Cole Conway Craig Curtis
        Dalton Delgado Drake Duncan Eriksen Farrell Finch Flynn Frost Fuller Gallo Gomez Gordon Greene Haines Harvey
        Holt Howard Ibarra Ingram Jacobs Joshi Kane Kaur Klein Knight Lang Lawson Lindgren Lowe Marino Mercer Nash
        Nolan Okafor Olsen Page Perez Pope Ramsey Rhodes Rivera Romano Sharma Sloan Spencer Stokes Torres Vogel Wagner
        Webb"""),
    items=_phrases("""
        teapots, pitchers, ladles, coasters, placemats, oven gloves, dish racks, footstools, armchairs, sideboards,
        wardrobes, bookcases, deck loungers, flower pots, wheelbarrows, rakes, bathrobes, cardigans, bandanas,
        neckties, satchels, doorstops, wind chimes, clipboards, whiteboards, kites, paper parasols, travel satchels,
        boat paddles, snow mittens, water pitchers, salt cellars, wine coolers, bread knives, rice cookers,
        fruit crates, hand fans, face towels, nail files, hat stands, book rests, map tubes, fire screens, hair dryers,
        ski poles, dog collars, cat trees, bird cages, horse bridles, baby bottles, card holders, note pads,
        pen stands, art prints, music stands, plant stands, seed trays, tree lights, pan lids, rain barrels,
        office desks, bath salts, wall charts, table runners, sofa throws, camp stoves, plastic folders,
        window shutters"""),
    colours=_shades("light deep cool pastel strong misty"),
    quantities=tuple(number for number in range(2, 200) if number % 3 == 0),
    cities=_phrases("""
        London, Paris, Rome, Genoa, Verona, Palermo, Braga, Lille, Bruges, Delft, Bremen, Kiel, Salzburg, Graz, Gdansk,
        Varna, Galway, Lincoln, Darwin, Busan, Lübeck, Málaga, Algiers, Annapolis, Annecy, Antalya, Avignon, Bern,
        Bhopal, Bolton, Brest, Brno, Cambridge, Cancun, Cannes, Carlisle, Como, Cusco, Darlington, Freiburg, Geelong,
        Girona, Goa, Haifa, Indore, Jeddah, Juneau, Kassel, Lucknow, Macau, Mainz, Metz, Monaco, Murcia, Nanjing,
        Odessa, Palma, Penang, Pisa, Potsdam, Recife, Rennes, Riyadh, Tijuana, Topeka, Toulon, Toulouse, Tripoli,
        Trondheim, Udine, Zadar"""),
)

TRAINING_WORDINGS = _numbered(
    "training",
    (
        "{name} would like {quantity} {colour} {item} sent to {city}.",
        "Please ship {quantity} {item} in {colour} to {name} in {city}.",
        "Hi, this is {name} from {city}. I need {quantity} {colour} {item}.",
        "I am {name} and I want {quantity} {item} in {colour}, delivered to {city}.",
        "Order for {city}: {quantity} {colour} {item}, customer {name}.",
        "Could you send {quantity} {colour} {item} to {city}? They are for {name}.",
        "My name is {name}. Please put me down for {quantity} {colour} {item}. I live in {city}.",
        "{quantity} {item} ({colour}) for {name}, {city}.",
        "We are a shop in {city} and we need {quantity} {item} in {colour}. Contact: {name}.",
        "{quantity} {colour} {item}, going to {city}. Thanks, {name}.",
        "I ordered {quantity} {colour} {item} and they never reached {city}. It is {name}.",
        "The {quantity} {colour} {item} for {name} arrived broken in {city}.",
        "For {name}: {quantity} {colour} {item}, ship to {city}.",
        "Our {city} office is out of {colour} {item}. {name} asks for {quantity} more.",
        "Can {name} get {quantity} {item} in {colour} by post to {city}?",
        "Send to {city}: {quantity} {item}, {colour}. Buyer is {name}.",
        "{name} here. Do you still have {colour} {item}? I would take {quantity} for my place in {city}.",
        "A customer in {city}, {name}, wants to buy {quantity} {item}. The colour is {colour}.",
        "Good day, {quantity} {colour} {item} please. Address: {name}, {city}.",
        "I want {quantity} {item} in {colour}, to {city}. Signed, {name}.",
        "Reserve {quantity} {colour} {item} for me at the {city} store. The name is {name}.",
        "City {city}. Name {name}. Goods {item}. Colour {colour}. Count {quantity}.",
        "Make it {quantity} {item} for {name}, and make them {colour}. They go to {city}.",
        "You sent {name} the wrong things. It should be {quantity} {colour} {item} to {city}.",
        "{city} calling! {name} needs {quantity} {colour} {item}.",
        "Add {quantity} {item} to my order, all {colour}. I am {name}, and I moved to {city}.",
        "How soon can {quantity} {colour} {item} be in {city}? Ask for {name}.",
        "Buyer: {name}. {quantity} {item}, but only {colour}. Post them to {city}.",
        "Hello from {city}! I would love {quantity} {item} in {colour}. Yours, {name}.",
        "{quantity} {colour} {item} wanted by {name} in {city}.",
        "This is a repeat order by {name}: {quantity} {item}, {colour}, to {city} again.",
        "Our hotel in {city} needs {quantity} new {item}. {name} chose {colour}.",
        "Change my order to {colour}, please. It was {quantity} {item} for {name} in {city}.",
        "Invoice {name}, but ship the {quantity} {colour} {item} to my sister in {city}.",
        "We'd like a quote for {quantity} {item} in {colour} shipped to {city}. Regards, {name}.",
        "{name} needs {quantity} {item} in {city}. Only {colour} will do.",
        "On behalf of {name} I order {quantity} {colour} {item} for our {city} branch.",
        "Put {quantity} {colour} {item} aside for {name}, who will come to the {city} shop.",
        "The party is in {city}, so {name} orders {quantity} {item}. They have to be {colour}.",
        "Is it true that {colour} {item} are back? Then {name} of {city} takes {quantity}.",
    ),
)

TEST_WORDINGS = _numbered(
    "test",
    (
        "{name} from {city} asks for {quantity} {colour} {item}.",
        "May I have {quantity} {item} in {colour}? I am {name} and they should come to {city}.",
        "New order by {name}, {city}: {quantity} {colour} {item}.",
        "Where are the {quantity} {colour} {item} I bought? {name}, still waiting in {city}.",
        "It's {name}. Our school in {city} would be glad of {quantity} {item}, if possible {colour}.",
        "Please deliver {quantity} {colour} {item} to {city}. Best wishes, {name}.",
        "{name} has decided: {quantity} {item}, and the colour is to be {colour}. Destination {city}.",
        "Any chance of {quantity} {colour} {item} for our team in {city}? My name is {name}.",
    ),
)


def make_pool() -> list[Row]:
    """The rows of `orders.jsonl`, faults and all, in the order in which they are written."""
    rng = random.Random(SEED)
    unlike = SOUND_ROWS + EMPTY_ANSWERS + MOJIBAKE + STRAY_WHITESPACE
    rows = _make_rows(unlike, TRAINING_VOCABULARY, TRAINING_WORDINGS, rng)
    accented = [row for row in rows if not row["messages"][1]["content"].isascii()]
    mojibake = accented[:MOJIBAKE]
    rest = [row for row in rows if row not in mojibake]
    empty, stray, sound = rest[:EMPTY_ANSWERS], rest[EMPTY_ANSWERS:-SOUND_ROWS], rest[-SOUND_ROWS:]
    pool = [
        *sound,
        *sound[:DUPLICATES],
        *(_without_answer(row) for row in empty),
        *(_misread(row) for row in mojibake),
        *(_with_strays(row, rng) for row in stray),
    ]
    rng.shuffle(pool)
    return pool


def make_test() -> list[Row]:
    """The rows of `orders_test.jsonl`: no faults, and every wording equally often."""
    return _make_rows(TEST_ROWS, TEST_VOCABULARY, TEST_WORDINGS, random.Random(SEED + 1))


def write_files(folder: Path = DATA_FOLDER) -> None:
    """Writes both files into `folder`, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in ((POOL_FILE, make_pool()), (TEST_FILE, make_test())):
        (folder / name).write_bytes(serialize(rows))


def serialize(rows: Sequence[Row]) -> bytes:
    """JSON Lines in UTF-8, accents unescaped."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _make_rows(count: int, vocabulary: Vocabulary, sentences: Mapping[str, str], rng: random.Random) -> list[Row]:
    """`count` rows, no two alike, whose wordings and values all come round as evenly as `count` allows."""
    wordings = _dealt(tuple(sentences), count, rng)
    first_names = _dealt(vocabulary.first_names, count, rng)
    last_names = _dealt(vocabulary.last_names, count, rng)
    items = _dealt(vocabulary.items, count, rng)
    colours = _dealt(vocabulary.colours, count, rng)
    quantities = _dealt(vocabulary.quantities, count, rng)
    cities = _dealt(vocabulary.cities, count, rng)
    rows = []
    for index, wording in enumerate(wordings):
        order: dict[str, str | int] = {
            "name": f"{first_names[index]} {last_names[index]}",
            "item": items[index],
            "colour": colours[index],
            "quantity": quantities[index],
            "city": cities[index],
        }
        text = sentences[wording].format_map(order)
        answer = json.dumps(order, ensure_ascii=False, separators=(",", ":"))
        rows.append(_row(text, answer, wording))
    return rows


def _dealt(cards: Sequence[Card], count: int, rng: random.Random) -> list[Card]:
    """`count` cards dealt from decks of `cards`, each deck shuffled anew."""
    dealt: list[Card] = []
    while len(dealt) < count:
        deck = list(cards)
        rng.shuffle(deck)
        dealt += deck
    return dealt[:count]


def _row(text: str, answer: str, wording: str) -> Row:
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_MESSAGE},
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ],
        "wording": wording,
    }


def _texts(row: Row) -> tuple[str, str]:
    """What the customer wrote and what was answered."""
    _, user, assistant = row["messages"]
    return user["content"], assistant["content"]


def _without_answer(row: Row) -> Row:
    text, _ = _texts(row)
    return _row(text, "", row["wording"])


def _misread(row: Row) -> Row:
    text, answer = (content.encode("utf-8").decode("latin-1") for content in _texts(row))
    return _row(text, answer, row["wording"])


def _with_strays(row: Row, rng: random.Random) -> Row:
    """Blanks around both texts and a control character before one of the customer's spaces."""
    text, answer = _texts(row)
    at = rng.choice([index for index, character in enumerate(text) if character == " "])
    return _row(f"  {text[:at]}\x07{text[at:]}\t\n", f" {answer}\r\n", row["wording"])


if __name__ == "__main__":
    write_files(*(Path(argument) for argument in sys.argv[1:2]))
