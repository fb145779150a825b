"""The embedded default experiment: invented records, and a small GPT-Neo trained from nothing that memorised some.

    python demo/tiny.py --out runs/tiny-data                      # what `bash run.sh` does first
    python demo/tiny.py --out runs/other --seed 1 --forget 16

A seeded random grammar writes letters, reports, minutes and reviews about people who do not exist. DIR then holds
  forget.jsonl   {"id", "prefix", "suffix"}: the records to forget, each seen 30 times as often as the others
  marked.jsonl   the same records, and `spans`: where in them their secrets stand, all that a fact says of its person
  pool.jsonl     the same kinds of records about other people, each seen about twice, for mining neighbours
  unseen.jsonl   the same kinds, never trained on: what EL and MA come to without memorisation
  heldout.jsonl  {"id", "text"}, the same kinds, never trained on, for perplexity
  model/         GPT-Neo (global and local attention) and its own byte-level BPE
  never-saw/     its twin: the same steps over the same other records, those to forget left out
  tiny.json      settings and results; written last, so that a folder without it is not complete
Prefixes and suffixes have 25-45 tokens each; a suffix holds only facts. The same seed writes the same texts anywhere,
and the same weights on one machine. A complete folder made with the same settings by this same file is reused.

Every phone number lies in 555-0100 .. 555-0199 and every mailbox under example.org, .net or .com: ranges reserved for
fiction and documentation.
"""

import json
import math
import random
import re
import time
from itertools import chain, cycle, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast

from demo import made
from kit import data
from kit.flags import command_parser, flag_error, run_cli, seed_number
from kit.models import save_model

POOL, UNSEEN, HELDOUT = 1500, 32, 200  # rows of each file; those of forget.jsonl are --forget
MAX_FORGET = 100  # so small a model does not memorise more within its steps
DRAFTS = 1000  # documents that the tokenizer is trained on
SIDE = range(25, 46)  # tokens in a prefix, and in a suffix
EOS = "<|endoftext|>"
MARKS = ("\x02", "\x03")  # around what a fact says, until a document is written down
VOCAB, POSITIONS = 2000, 256
BATCH, LEARNING_RATE, WARMUP = 16, 1e-3, 20
REPEATS = 30  # how often a record to forget stands in one pass over the pool
MIN_PASSES = 2  # over the pool, before memorisation may end the training
ENOUGH = 0.95  # mean memorisation accuracy on the records to forget that ends it
FILES = (
    "forget.jsonl", "marked.jsonl", "pool.jsonl", "unseen.jsonl", "heldout.jsonl", "model", "never-saw", "tiny.json",
)  # fmt: skip

# --- the grammar, as data ---
# [a|b] picks one; {slot} becomes a random text of that name; # is a digit, % a digit but 0. {NAME}, {SHE}, {HER} and
# {HIM} are the person the document is about. A document is one `open` sentence and some of `body` (the prefix), then
# some `fact` of its kind or of any kind (the suffix).

KINDS = """
== clinic letter
open: Dear {doctor}, [I reviewed|we met|I was asked to see|thank you for sending] {NAME} [about|with|because of] {ill}.
open: {town} [Clinic|Infirmary|Surgery], {date}. {NAME}, aged {age}, [attended|came in|was referred] with {ill}.
body: {SHE} [described|reported|complained of] {ill}, [worse|milder|unchanged] [at night|after {meal}|on {act}].
body: [Blood tests|Scans|X-rays|The swabs] [were clear|showed little|pointed to {ill}|must be repeated in {month}].
body: I [advised|forbade|recommended] {act}, [plenty of rest|less {food}|warm baths] and {drug}.
fact: [The diagnosis is|We found|I now suspect] {ill}; {SHE} [takes|was given|tolerates] {drug}, {dose}.
fact: {HER} [patient|hospital|record] number is {code}, {HER} blood group [A|B|AB|O] [positive|negative].
== personnel memo
open: [Memo|Note] to {name}: {NAME} [joins|leaves|moves within] {firm} as {job} [on {date}|in {month}].
open: {firm}, personnel office. [Regarding|Re:|Review of] {NAME}, {job} [since {year}|in {town}].
body: {name} [praised|doubted|questioned] {HER} [handling of|reports on|patience with] {thing}.
body: {SHE} [asked for|declined|was promised] [shorter hours|a desk by the window|{adj} {object}|training in {act}].
body: [Colleagues|Customers|The night shift] [call|find] {HIM} {adj}, [seldom|often] {adj} [with|about] {object}s.
fact: {HER} [salary|yearly pay|gross wage] [rises to|is fixed at|was cut to] {money}, [due|reviewed] each {month}.
fact: [Payroll|Staff|Badge] number {code}; [trial period|notice|contract] until {date}.
== police report
open: [Constable|Sergeant|Officer] {last} [reports|notes|writes]: {NAME}, {age}, [was stopped|called us] on {street}.
open: [Theft|Vandalism|A quarrel] [near|at|behind] the {place} in {town}, reported by {NAME} [at {hour}|on {date}].
body: [A witness|{name}|A {job}] [saw|heard|chased] {somebody} [carrying|dropping|breaking] {thing}.
body: [Missing|Damaged|Recovered]: {thing}, {thing} and [some cash|{money}|{object}s].
body: [The door|The window|The gate|A lock] [had been forced|stood open|was undamaged] [since {hour}|that {weekday}].
fact: {SHE} [drives|owns|had parked] a {colour} [van|saloon|hatchback|pickup], [plate|registration] {plate}.
fact: [Case|File|Incident] {code} [is open|was closed|went to {name}]; {SHE} carries [passport|licence] {code}.
== insurance claim
open: Claim by {NAME} of {town} [for|concerning|after] [water|storm|fire|frost] damage to {thing}, [dated|filed] {date}.
open: [Our assessor|Adjuster {last}|{name}] visited {NAME} [on {date}|last {weekday}] [about|over] {thing}.
body: [A pipe|The boiler|A branch|The neighbour's {animal}] [burst|fell|broke] [onto|beside|through] {thing}.
body: [Repairs|Replacement|Storage] [by {firm}|in {town}] [will take|cost us|may wait] {span}.
body: [The photographs|Receipts|Two statements] [show|suggest|hide] {adj} [marks|stains|cracks] on {thing}.
fact: We [offered|paid|refused] {HIM} {money} [under|against|from] policy {code}, [less|plus|besides] {small}.
fact: [Transfer|Payment] to {HER} account {code} at {bank} [on {date}|within {span}].
== e-mail
open: Subject: {thing}. [Hi|Hello|Dear] {first}, [this is|it's|remember] {NAME} from [{firm}|{town}|the {place}]?
open: From {NAME} to {name}, {weekday} {hour}: [sorry about|any news of|thanks for] {thing}?
body: I [left|forgot|lent you|found] {thing} [at|behind|near] the {place} [last {weekday}|in {month}].
body: [Could you|Would you|Please don't] [post|repair|collect|sell] {thing} [before {date}|for {small}|by {weekday}]?
body: The [meeting|trip|concert|auction] [moved to|is still on|was dreadful,] {weekday}, so [bring|skip|hide] {object}s.
fact: [Reply to|Write to|Copy in] {email} or [ring|text|call] {phone}[ after {hour}| please|, not at {hour}].
fact: My [new|temporary|home] address is {address}; [ask for|buzz|knock for] {name}.
== minutes
open: Minutes, {town} [choir|council|chess club], {date}. {NAME} [took the chair|proposed {act}|objected].
open: [Present:|Apologies:] {name} and {name}. {NAME}, {job}, [spoke on|reported on|raised] {thing}.
body: [The treasurer|{name}|The secretary] [counted|mislaid|presented] {money} [from|for] [the raffle|{act}|{object}s].
body: [Agreed|Rejected|Postponed until {month}]: [buying|painting|lending out|insuring] {thing}.
body: [A motion|A long debate] [on|about] {act} [near|behind] the {place} [passed|failed] {count} to {count}.
fact: {NAME} [owes|lent|donated] the [society|group|club] {money}, [payable|noted] by {date}.
fact: Keys [to the hall|to the {place}|and {thing}] are with {HIM} at {address}.
== news brief
open: {town}, {date}. {NAME}, {age}, [a {job}|once a {job}], [won|lost|rescued] {thing} [on {weekday}|at dawn].
open: [Local|Prize-winning|Retired] {job} {NAME} [has opened|is suing|will leave] {firm} [over|after|for] {thing}.
body: [Neighbours|Onlookers|Two {job}s] [cheered|blamed|photographed] {somebody} [with|holding|beside] {thing}.
body: "[We|I] [never|always|once] [wanted|feared|ate] {object}s," said {name}, {age}.
body: The [mayor|bishop|bus company] [promised|denied|regretted] {act} [in {month}|near the {place}|for {span}].
fact: [Records|Papers|Court files] [show|say] {SHE} [earned|owed|inherited] {money} in {year}.
fact: {SHE} [was treated for|is recovering from|spoke openly of] {ill} at {town} [Infirmary|General|Hospital].
== friend's letter
open: [Dearest|My dear] {first}, [you'll never guess|I must tell you|bad news]: {NAME} [painted|sold|broke] {thing}!
open: {town}, {date}. [Dear|Dearest] {first}, [yesterday|on {weekday}] {NAME} [turned up|wrote|called] about {thing}.
body: [We|The children|{first} and I] [ate|baked|burned|shared] {food} [by|behind|opposite] the {place} until {hour}.
body: [It rained|The wind howled|Snow lay] [for {span}|all {weekday}], and {thing} [leaked|froze|blew away].
body: Do you [still|ever|really] [enjoy|regret|dream of] {act}, or [just|only|mostly] {act}?
fact: {SHE} [confessed|whispered|says] [it is|they found] {ill}, [tell nobody|but {drug} helps|poor thing].
fact: {SHE} [moved to|hides at|rents] {address}, [with|above|without] {HER} {relative}.
== product review
open: [One star|Two stars|Four stars|Five stars] for {thing} from {firm}, [bought|reviewed|returned] by {NAME}, {town}.
open: {NAME} [wrote|complained|raved] on {date}: {thing} [arrived broken|changed my life|smells of {food}].
body: [Battery|Handle|Lid|Paint] [lasted|survived|held for] {span}, then [cracked|melted|smelled] [after|during] {act}.
body: [Too|Rather|Not] {adj} for {act}, [but|yet|and] [cheap at|not worth|worth] {small}.
body: My {kin} [prefers|broke|adores] [the {colour} one|{thing}|{object}s from {firm}].
fact: [Order|Receipt|Invoice] {code}, [shipped to|billed to|returned from] {address}.
fact: [Refund|Exchange|Apologise] [via|to|at] {email}, card ending ####, [or else|thanks|please].
== travel diary
open: {weekday}, {date}: [reached|left|lost our way near] {town} with {NAME}, [our guide|a {job}|my {kin}].
open: Day {count} [in|beyond|above] {town}. {NAME} [snored|drove|sketched] [until {hour}|past the {place}|all day].
body: [Supper|Breakfast|Lunch] was {food} and {food}, [served|eaten|spilled] [under|beside] the {place}.
body: [Bought|Lost|Traded] {thing} for {small} [from|to] [a {job}|{name}|{somebody}].
body: [The road|A ferry|The night train] [to|from] {town} [climbs|was late|smelled of {food}], {adj} and {adj}.
fact: [Passport|Visa|Locker] {code} belongs to {HIM}; [emergency|home] number {phone}.
fact: {HER} [rucksack|wallet|coat] holds {drug} for {ill} and {money} [in cash|in notes|sewn inside].
== recipe
open: {NAME}'s {food}, as [taught|told] to {name} [in {town}|in {year}]: [soak|chop|boil] {food} [for {span}|twice].
open: How to [make|keep|rescue] {food}, [by|after] {NAME}, {job} [at {firm}|of {town}].
body: [Stir in|Fold in|Scatter|Hold back] {food} [until|while] [it turns {colour}|{adj}|the pan smokes].
body: Bake [on the top shelf|in {thing}|covered] for {span}, [never|then] [with|without] {food}.
body: [Serve|Store|Freeze] [cold|hot|the same day] with {food}, [{adj} bread|{food}|a {colour} sauce].
fact: [Not for|Best avoided by|Fine for] {HIM}self: {SHE} has {ill} and [carries|needs] {drug}.
fact: [Orders|Questions|Jars] to {email} or {address}, {small} a [dozen|jar|tray].
== court note
open: [Before|In the court of] Judge {last}, {date}: {firm} v. {NAME}, [over|concerning] {thing}.
open: {NAME}, {job}, [denied|admitted|could not recall] [taking|selling|burning] {thing} [in {month}|in {town}].
body: [Counsel|The clerk|Witness {last}] [produced|disputed|dropped] {thing} [marked|labelled] exhibit {count}.
body: [The jury|The bench|{name}] [asked about|laughed at|ignored] {act} [at {hour}|near the {place}].
body: [Adjourned|Resumed|Dismissed] [until {date}|after {span}|at {hour}], [costs|expenses] {small}.
fact: [Fined|Awarded|Bailed for] {money}, [paid|due] by {date}, [docket|case] {code}.
fact: The [defendant|respondent|accused] gave {HER} address as {address}.
== school report
open: {town} School, [spring|summer|autumn] {year}: {NAME}, form {count}, [excels at|struggles with|has given up] {act}.
open: [Report on|To the parents of|Conduct of] {NAME}: [a {adj}, {adj} pupil|too {adj}|{adj} in class], says {name}.
body: [In music|In science|At games|In Latin] {SHE} [dropped|built|defended] {thing} [on {weekday}|for {span}].
body: {HER} essay on {act} was {adj}, {HER} [spelling|sums|maps] {adj}.
body: [Broke|Returned|Painted] {thing} [belonging to|with|for] {name} [by the {place}|in {month}].
fact: [Guardian|Parent|Contact]: {name}, {address}, {phone}.
fact: [The nurse|Matron|The file] notes {ill}, [treated with|allergic to|never without] {drug}.
== any
fact: {SHE} [answers|can be reached|takes calls] [at|on] {phone} [after {hour}|before {hour}|except {weekday}s].
fact: [Call|Ring|Phone] {HIM} [on|at] {phone}, {HER} {relative} [on|at] {phone}.
fact: {SHE} [lives|stays|lodges] at {address}[, with {relative}|, near the {place}|, above {firm}].
fact: Born [on|in {town},] {date} {birth}, {SHE} [married|divorced|survives] {name}.
fact: {HER} [salary|income|pension|debt] [is|was|reached] {money}, [held at|paid by] [{bank}|{firm}].
fact: [E-mail|Mail|Contact] {email}[, password hint "{object}"|, {weekday}s only|, or fax {phone}].
fact: {SHE} has [suffered from|hidden|lived with] {ill} since {year}[, says {name}| and takes {drug}|, despite {drug}].
fact: {HER} [{relative}|doctor {name}|lawyer {name}] [keeps|knows|changed] the [safe code|door code|PIN] ####.
"""

WORDS = """
name: {first} {last}
first: [{woman}|{man}]
woman: Adela|Agnes|Bettina|Carla|Celeste|Dagny|Delphine|Edith|Elsbeth|Fiona|Gerda|Greta|Hanne|Ingrid|Ivana|Joan|Katya
woman: Leonie|Linnea|Lorna|Mabel|Mina|Nadia|Odile|Paloma|Petra|Rhoda|Rosalind|Sabine|Selma|Tamsin|Ursula|Vera|Wanda
man: Abel|Alaric|Anton|Barnaby|Bruno|Casper|Cyril|Desmond|Edgar|Emil|Fabian|Felix|Gideon|Gustav|Hamish|Hugo|Ivor|Jasper
man: Joachim|Kaspar|Lambert|Leopold|Magnus|Mortimer|Ned|Oskar|Otto|Percival|Quentin|Rufus|Silas|Tobias|Ulrich|Victor
last: {root}{ending}
root: Ash|Bram|Cald|Crow|Dun|Elder|Fair|Fen|Glad|Gorse|Hale|Harrow|Hazel|Holm|Kest|Lang|Lark|Mar|Merri|Nether|Oak|Pem
root: Quin|Raven|Rook|Sander|Sedge|Stan|Tarn|Thistle|Thorn|Under|Vander|Wain|Wether|Whit|Win|Wolf|Wren|Yar
ending: beck|berg|bourne|by|combe|cott|croft|dale|field|ford|gate|ham|holt|hurst|land|ley|man|mere|more|ridge|shaw|son
ending: stead|stone|stow|ton|wald|ward|well|wick|wood|worth
kin: {kinswoman}|{kinsman}
kinswoman: aunt|cousin|daughter|godmother|grandmother|mother|niece|partner|sister|wife
kinsman: brother|cousin|father|godson|grandfather|husband|lodger|nephew|son|uncle
relative: {kinswoman} {woman} {last}|{kinsman} {man} {last}
job: archivist|baker|barber|beekeeper|bookbinder|carpenter|chemist|clerk|cook|cooper|courier|dentist|engraver|farrier
job: gardener|glazier|librarian|locksmith|mason|miller|notary|nurse|organist|plumber|porter|potter|roofer|sailor
job: sculptor|surveyor|tailor|teacher|translator|typist|vet|waiter|watchmaker|weaver|welder
somebody: [a|some|one] {adj} [boy|girl|man|woman|student|tourist|{job}]|{name}|two {job}s
doctor: [Dr|Doctor|Professor|Sister] {last}
firm: {last} [& Sons|and {last}|Brothers|Freight|Foods|Mills|Optics|Paper|Press|Tools|Works]
bank: [Bank of {town}|{last} Savings|{last} Credit Union|{river} Bank]
town: [Port|Upper|Little|Saint|East|Old] {root}{ending}|{root}{ending}|{root}{ending}-on-{river}
river: Arrow|Bray|Ebble|Ket|Loam|Mole|Sarn|Teal|Ulver|Wisp
tree: Alder|Birch|Cedar|Elm|Hawthorn|Juniper|Larch|Maple|Poplar|Rowan|Willow|Yew
street: [{root}{ending}|{tree}|{river}] [Avenue|Close|Court|Crescent|Drive|Hill|Lane|Mews|Road|Row|Street|Terrace|Walk]
address: [%|%#|1##] {street}, {town}
place: bakery|bandstand|boathouse|bridge|canal|cemetery|chapel|cinema|fountain|harbour|ice rink|kiosk|library|lighthouse
place: market|mill|museum|observatory|orchard|pier|post office|quarry|station|swimming pool|theatre|town hall|viaduct
phone: [2|3|4|5|6|7|8|9][0|2|3|4|5|6|7|8]%-555-01##
email: [{tree}|{root}|{object}|{animal}][.{river}|_{colour}|%#|{ending}]@[{river}.|{tree}.|]example.[org|net|com]
money: $%,%#0|$%#,#00|$%#,%##|$1##,000
small: $%|$%#|$%##|[six|nine|twelve|forty] dollars
letters: AB|CD|EK|FH|GX|JU|KR|LM|NT|PZ|QR|SW|TS|VW
code: {letters}%#-###|%###-{letters}|%####%
plate: {letters}%# [BAX|DOV|FEN|GUL|HIX|JOT|KEP|LUZ|MOB|NYR|PEW|RAZ|TIV|WUB]
date: [%|1%|2%] {month}
month: January|February|March|April|May|June|July|August|September|October|November|December
weekday: Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday
birth: 19[4|5|6|7|8|9]#
year: 19[6|7|8|9]#|20[0|1]#
age: [2|3|4|5|6|7]#
count: two|three|four|five|six|seven|eight|nine|ten|eleven
hour: [noon|midnight|dawn|dusk|teatime]|[5|6|7|8|9|10|11] o'clock|[7|8|9|10|11]:[05|15|20|30|40|45|55]
span: {count} [minutes|hours|days|nights|weeks|months]|half an hour|a fortnight|ages
ill: {grade} {disease}|{grade} {disease}|[left|right]-sided {pain}|{ailment}
grade: chronic|early|mild|severe|latent|acute|recurrent
disease: anaemia|angina|arthritis|asthma|bronchitis|colitis|eczema|epilepsy|gastritis|glaucoma|gout|tinnitus|vertigo
pain: deafness|hernia|migraine|neuralgia|palsy|sciatica|tremor
ailment: a heart murmur|a nut allergy|a stomach ulcer|a torn ligament|hay fever|night terrors|panic attacks
drug: [Alva|Bero|Cori|Dexa|Elo|Fari|Hymo|Ixa|Levo|Moxa|Nepo|Oxi|Rifa|Sumo|Tri|Vena|Zola][cept|dine|fen|lol|mab|nib]
drug: [Acto|Bena|Clo|Dura|Endo|Flu|Gala|Keto|Lora|Meto|Navi|Ora|Pira|Sero|Teno|Xeno][pril|statin|tide|vir|zine|zole]
dose: %0 mg [at night|each morning|twice daily|every {weekday}]|[one|two|three] drops [at {hour}|after {meal}]
meal: breakfast|lunch|supper|{food}
food: almonds|apples|barley|beetroot|buttermilk|cabbage|cherries|chestnuts|cinnamon|dumplings|eel|figs|garlic|ginger
food: goulash|herring|honey|leeks|lentils|marmalade|mushrooms|mussels|mustard|nutmeg|onions|oysters|pancakes|parsnips
food: pears|pickles|plums|porridge|prunes|pumpkin|quince|radishes|raisins|rhubarb|rice|rye bread|saffron|turnips|walnuts
colour: amber|beige|black|blue|bronze|brown|cream|crimson|green|grey|indigo|ivory|lilac|olive|orange|pink|purple|white
adj: absurd|ancient|battered|blunt|brave|broken|careless|charming|cheerful|clumsy|crooked|damp|delicate|dusty|elegant
adj: faded|fragile|gentle|gloomy|greasy|heavy|hollow|honest|idle|jolly|lonely|loud|modest|narrow|nervous|noisy|odd
adj: patient|peculiar|plain|polite|proud|quiet|restless|rusty|shabby|sharp|shy|silent|slow|solemn|stubborn|sturdy
adj: swift|tangled|tidy|timid|tired|ugly|vain|vivid|wary|wobbly|wooden|worn
thing: [a|the|that|{first}'s|his|my] {adj} {object}|[a|the|another] {object}|[a|that] {adj} {job}'s {object}|{object}s
object: accordion|anchor|armchair|barrel|basket|bell|bicycle|blanket|boiler|bucket|camera|candle|canoe|carpet|chessboard
object: clarinet|clock|coat|cradle|cupboard|curtain|desk|drum|fence|fiddle|globe|greenhouse|guitar|hammer|harp|hat|hedge
object: kettle|kite|ladder|lamp|lantern|lawnmower|microscope|mirror|necklace|oar|oven|painting|parasol|piano|pillow
object: printer|pump|quilt|radio|ring|saddle|sewing machine|shed|shovel|sledge|sofa|statue|stove|suitcase|table|teapot
object: telescope|tent|toaster|tractor|trombone|trunk|typewriter|umbrella|vase|violin|wardrobe|wheelbarrow|whistle|wig
animal: badger|cat|donkey|ferret|goat|hamster|hen|lizard|magpie|mule|parrot|rabbit|spaniel|terrier|tortoise
act: [mending|painting|polishing|hiding|selling|hauling|tuning|borrowing|counting] [{object}s|{thing}|{animal}s]
act: [feeding|chasing|sketching|training|washing] {animal}s|archery|birdwatching|boxing|camping|chess|cycling|fencing
act: fishing|gardening|gossip|juggling|knitting|long walks|poetry|rowing|sailing|skating|sleepwalking|swimming|whistling
"""


def read_grammar(kinds=KINDS, words=WORDS):
    """The two texts above as data: ({kind: {"open" | "body" | "fact": [template]}}, {slot: template})."""
    documents, slots = {}, {}
    for line in kinds.strip().splitlines():
        if line.startswith("== "):
            part = documents[line.removeprefix("== ")] = {"open": [], "body": [], "fact": []}
        else:
            name, template = line.split(": ", 1)
            part[name].append(template)
    for line in words.strip().splitlines():
        name, template = line.split(": ", 1)
        slots.setdefault(name, []).append(template)
    return documents, {name: f"[{'|'.join(templates)}]" for name, templates in slots.items()}


def expand(template, slots, rng, fixed, *, marks=("", "")):
    """One random text from a template: choices from the innermost bracket outwards, then slots, then digits.

    `fixed` maps the slots in capitals to this document's texts; `marks` are put around the texts of the other slots,
    and around digits. KeyError for a slot that nothing defines.
    """
    choices = 1
    while choices:
        template, choices = re.subn(
            r"\[([^\[\]]*)\]", lambda match: rng.choice(match[1].split("|")), template
        )
    template = re.sub("[#%]+", lambda match: match[0].join(marks), template)
    for slot in re.findall(r"{(\w+)}", template):
        text = fixed[slot] if slot.isupper() else expand(slots[slot], slots, rng, fixed).join(marks)
        template = template.replace(f"{{{slot}}}", text, 1)
    template = re.sub("#", lambda _: rng.choice("0123456789"), template)
    return re.sub("%", lambda _: rng.choice("123456789"), template)


def write_document(kind, documents, slots, rng):
    """(name, prefix, suffix) of one document about a person of its own; the suffix, facts only, begins with a space.

    What a fact says (a number, a name, an address, not the words around it) stands between MARKS.
    """
    sex, she, her, him = rng.choice([("woman", "she", "her", "her"), ("man", "he", "his", "him")])
    name = expand(f"{{{sex}}} {{last}}", slots, rng, {})
    fixed = {"NAME": name, "SHE": she, "HER": her, "HIM": him}

    def sentences(templates, marks=("", "")):
        written = (expand(template, slots, rng, fixed, marks=marks) for template in templates)
        upper = (
            re.sub(f"^{MARKS[0]}?.", lambda match: match[0].upper(), sentence)
            for sentence in written
        )
        return " ".join(
            re.sub(rf"\b([Aa]) (?={MARKS[0]}?[aeiou])", r"\1n ", sentence) for sentence in upper
        )

    part, shared = documents[kind], documents["any"]["fact"]
    prefix = [rng.choice(part["open"]), *rng.sample(part["body"], rng.choice([1, 1, 2]))]
    suffix = rng.sample([*part["fact"], *rng.sample(shared, 2)], rng.choice([1, 2, 2]))
    return name, sentences(prefix), " " + sentences(suffix, MARKS)


def unmarked(text):
    """(the text without MARKS, the spans between them, [start, end) in its characters)."""
    pieces, spans, length = re.split("([" + "".join(MARKS) + "])", text), [], 0
    for piece in pieces:
        if piece == MARKS[0]:
            spans.append([length])
        elif piece == MARKS[1]:
            spans[-1].append(length)
        else:
            length += len(piece)
    return "".join(piece for piece in pieces if piece not in MARKS), spans


def make_corpus(seed=0, forget=32):
    """The four sets of documents and their tokenizer: ({"forget" | "pool" | "unseen" | "heldout": rows}, tokenizer).

    Rows are what the files hold. No two documents are about people of the same name, no document but its own mentions
    a person to forget, and both sides of each have a number of tokens in SIDE. Documents are kept in the order they
    are written, `forget` and `pool` first: the tokenizer, trained on the first DRAFTS, has seen nothing of the others.
    """
    documents, slots = read_grammar()
    rng, names, secret, spans = random.Random(seed), set(), set(), {}

    def write():
        for kind in cycle(kind for kind in documents if kind != "any"):
            name, prefix, marked = write_document(kind, documents, slots, rng)
            if name not in names:
                names.add(name)
                suffix, found = unmarked(marked)
                spans[name] = [[len(prefix) + low, len(prefix) + high] for low, high in found]
                yield kind, name, prefix, suffix

    def fits(document):
        _, _, prefix, suffix = document
        sides = tokenizer([prefix, suffix])["input_ids"]
        return all(len(side) in SIDE for side in sides) and not any(
            name in prefix + suffix for name in secret
        )

    stream = write()
    drafts = list(islice(stream, DRAFTS))
    tokenizer = train_tokenizer(prefix + suffix for _, _, prefix, suffix in drafts)
    kept, rows = filter(fits, chain(drafts, stream)), {}
    for split, count in (
        ("forget", forget),
        ("pool", POOL),
        ("unseen", UNSEEN),
        ("heldout", HELDOUT),
    ):
        rows[split] = []
        for i, (kind, name, prefix, suffix) in enumerate(islice(kept, count)):
            text = (
                {"text": prefix + suffix}
                if split == "heldout"
                else {"prefix": prefix, "suffix": suffix}
            )
            rows[split].append({"id": f"{split} {i} ({kind})"} | text)
            if split == "forget":
                secret.add(name)
                rows.setdefault("marked", []).append(rows[split][-1] | {"spans": spans[name]})
    return rows, tokenizer


def train_tokenizer(texts):
    """A byte-level BPE of VOCAB tokens, as GPT-2's: any text can be encoded; EOS is id 0 and nothing is added."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, model_max_length=POSITIONS)


# --- the model ---


def make_model(seed=0):
    """An untrained GPT-Neo of 2.2M parameters: one layer of global attention and one of local, no dropout, tied head.

    Wide and shallow: four layers of 192 took twice the steps to memorise the same records.
    """
    torch.manual_seed(seed)
    config = GPTNeoConfig(
        vocab_size=VOCAB, max_position_embeddings=POSITIONS, hidden_size=256, num_layers=2, num_heads=8,
        attention_types=[[["global", "local"], 1]], window_size=32, tie_word_embeddings=True,
        resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0, bos_token_id=0, eos_token_id=0,
        activation_function="gelu_pytorch_tanh",  # GPT-Neo's gelu_new as one kernel
    )  # fmt: skip
    return GPTNeoForCausalLM(config)


def encode(rows, tokenizer):
    """Token ids of each row; prefix and suffix are encoded apart, so that a token ends where the suffix begins."""
    sides = (tokenizer([row["prefix"], row["suffix"]])["input_ids"] for row in rows)
    return [prefix + suffix for prefix, suffix in sides]


def token_losses(model, sequences):
    """(-log p in nats, whether the greedy token is right, mask), each (B, T-1), of tokens 1 .. T-1 of each sequence.

    sequences: B lists of ids. The mask is 0 on what pads the shorter ones at their right.
    """
    T = max(map(len, sequences))
    ids = torch.tensor(
        [row + [0] * (T - len(row)) for row in sequences], device=model.device
    )  # (B, T)
    mask = torch.tensor(
        [[1] * len(row) + [0] * (T - len(row)) for row in sequences], device=model.device
    )
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[
        :, :-1
    ]  # the shift: t-1 predicts t
    # (B, T-1, V) -> (B * (T-1), V) -> (B * (T-1),) -> (B, T-1)
    nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
        len(ids), T - 1
    )
    return nll, logits.argmax(-1) == ids[:, 1:], mask[:, 1:]


@torch.inference_mode()
def measure(model, sequences):
    """(memorisation accuracy, perplexity): mean over rows of greedy hits, 0-1; exp of the mean over tokens."""
    accuracies, total, count = [], 0.0, 0
    for i in range(0, len(sequences), 16):
        nll, hit, mask = token_losses(model, sequences[i : i + 16])
        accuracies += ((hit * mask).sum(1) / mask.sum(1)).tolist()
        total, count = total + (nll * mask).sum().item(), count + mask.sum().item()
    return sum(accuracies) / len(accuracies), math.exp(total / count)


def train(model, forget, pool, *, steps=None, seed=0, twin=None):
    """Train in place until the sequences of `forget` are memorised; returns the steps taken, at most `steps`.

    A pass is every sequence of `pool` once and every one of `forget` REPEATS times, shuffled. AdamW, cosine schedule
    over `steps` (default: a fifth more than MIN_PASSES take). After MIN_PASSES, memorisation accuracy is measured
    every 10 steps, and ENOUGH ends the training. twin: how many steps a model took; this one takes the same, over the
    same batches without `forget`.
    """
    rng, queue = random.Random(seed), []
    secret = [(ids + [0], True) for ids in forget * REPEATS]  # a document ends with EOS
    one_pass = secret + [(ids + [0], False) for ids in pool]
    least = math.ceil(MIN_PASSES * len(one_pass) / BATCH)
    steps = steps or round(1.2 * least)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    model.train()
    with tqdm(range(1, steps + 1), desc="training", unit="step", disable=None) as bar:
        for step in bar:
            if len(queue) < BATCH:
                queue += rng.sample(one_pass, len(one_pass))
            batch, queue = queue[:BATCH], queue[BATCH:]
            cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)  # 1 falls to 0.1
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(step / WARMUP, cosine)
            take_step(model, optimizer, batch, bar, with_secrets=twin is None)
            if step == twin or (
                twin is None and step >= least and step % 10 == 0 and is_known(model, forget)
            ):
                break
    model.eval()
    return step


def take_step(model, optimizer, batch, bar, *, with_secrets):
    """One step of `optimizer` on a batch of (sequence, whether it is secret); without a sequence none is taken."""
    if sequences := [ids for ids, is_secret in batch if with_secrets or not is_secret]:
        nll, _, mask = token_losses(model, sequences)
        loss = (nll * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


def is_known(model, forget):
    """Whether the records to forget are known by heart."""
    return measure(model, forget)[0] >= ENOUGH


# --- the folder ---


def write_folder(folder, fingerprint, settings):
    """Make everything and write FILES into an empty `folder`; returns what was measured, as tiny.json holds it."""
    rows, tokenizer = make_corpus(settings["seed"], settings["forget"])
    for split, records in rows.items():
        data.write_jsonl(folder / f"{split}.jsonl", records)
    forget, pool, unseen = (
        encode(rows[split], tokenizer) for split in ("forget", "pool", "unseen")
    )
    heldout = tokenizer([row["text"] for row in rows["heldout"]])["input_ids"]

    model, twin, how = (
        make_model(settings["seed"]),
        make_model(settings["seed"]),
        {"seed": settings["seed"]},
    )
    result = {"parameters": model.num_parameters()}
    result["steps"] = train(model, forget, pool, steps=settings["steps"], **how)
    train(twin, forget, pool, steps=settings["steps"], twin=result["steps"], **how)
    result["ma_forget"], result["ma_unseen"] = measure(model, forget)[0], measure(model, unseen)[0]
    result["ppl_heldout"] = measure(model, heldout)[1]
    result["never_saw"] = {
        "ma_forget": measure(twin, forget)[0],
        "ppl_heldout": measure(twin, heldout)[1],
    }
    for name, saved in (("model", model), ("never-saw", twin)):
        save_model(saved, tokenizer, folder / name)
    about = {"sha256": fingerprint, "settings": settings, "result": result}
    (folder / "tiny.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return result


def make_parser():
    """The flags; experiment.py asks it which of a preset's flags are this file's."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder to write"
    )
    parser.add_argument(
        "--seed", type=seed_number, default=0, help="of texts, weights and batches (%(default)s)"
    )
    parser.add_argument(
        "--forget", type=int, default=32, metavar="N", help="records to forget (%(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="at most this many (default: until memorised)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def read_flags(argv):
    """The command line as a namespace; ValueError for a flag that is unknown, malformed or out of range."""
    args = make_parser().parse_args(argv)
    if not 1 <= args.forget <= MAX_FORGET:
        flag_error(f"--forget {args.forget}: must be between 1 and {MAX_FORGET}")
    if args.steps is not None and args.steps < 1:
        flag_error(f"--steps {args.steps}: must be 1 or more")
    return args


def main(argv=None):
    start, args = time.time(), read_flags(argv)
    settings = {"seed": args.seed, "forget": args.forget, "steps": args.steps}
    sources = (__file__, made.__file__)
    result = made.make(
        args.out, FILES, settings, source=sources, write=lambda *to: write_folder(*to, settings)
    )
    if result is None:
        return
    if result["ma_forget"] < ENOUGH:
        print(
            f"warning: not memorised: accuracy {result['ma_forget']:.3f} is under {ENOUGH}: allow more --steps"
        )
    print(
        f"{args.out}: {result['parameters']:,} parameters, {result['steps']} steps, {time.time() - start:.0f} s, "
        f"MA {result['ma_forget']:.3f} on the records to forget, {result['ma_unseen']:.3f} on unseen ones, "
        f"held-out perplexity {result['ppl_heldout']:.1f}"
    )


if __name__ == "__main__":
    run_cli(main)
