"""Rules on the text of a prompt: which forms are not trained on, and what a prompt is about.

Section 2.1 of the report leaves out multiple-choice, true/false and proof questions: the first two
are easily guessed right, and no rule can check a proof.
"""

import re

LETTER = re.compile(r"\W*(?:the answer is\W*)?(?:option\s+)?([A-Ja-j])(?:[).:].*|\W*)", re.S | re.I)
"""An answer that names an option, with or without the option's text."""

LABELS = (
    re.compile(r"(?:^|[\s;,])\(([A-Za-z])\)(?=\s*\S)", re.M),  # (A) red
    re.compile(r"(?:^|[\s;,])([A-Za-z])\)(?=\s*\S)", re.M),  # A) red
    re.compile(
        r"(?:^|\n)[ \t]*(?:[-*][ \t]*)?\**([A-Z])\**[.:]\**(?=\s*\S)"
    ),  # A. red, a line each
    re.compile(r"\s\(?([A-E])[.:](?=\s+\S)"),  # A. red B. blue
    re.compile(r"\\(?:textbf|mathrm|text)\s*\{\s*\(([A-E])\)"),  # \textbf{(A)}\ red
)

CHOICE = re.compile(
    r"\b(?:which (?:one )?of the (?:following|options|statements)|(?:answer|multiple)[ -]?choices?|"
    r"choose (?:the|one|from|all)|select (?:the|one|all)|pick (?:the|one)|options?\s*:)",
    re.I,
)

TWO_ANSWERS = re.compile(r"true|false|yes|no|right|wrong|(?:in)?correct|(?:in)?valid")
TWO_CHOICES = re.compile(
    r"\b(?:true\s*(?:or|/)\s*false|t\s*/\s*f\b|(?:yes\s*(?:or|/)\s*no)|is (?:this|the following) "
    r"(?:statement|claim) (?:true|correct))",
    re.I,
)

PROGRAM = re.compile(
    r"^[ \t]*(?:def|class) \w+|\bc\+\+|\b(?:program|function) that\b|"
    r"\b(?:python|javascript|stdin|standard input|linked list|subarray|binary tree)\b",
    re.I | re.M,
)

PROOF = re.compile(
    r"(?:^|[.;:!?,)\]$]\s+|\n[ \t]*|\b(?:and|then|to|please|hence|thus|or)\s+)"
    r"(?:(?:dis)?prove\b|show\s+(?:that|how|why)\b|give\s+a\s+proof|write\s+a\s+proof|"
    r"(?:demonstrate|verify|justify|deduce|establish|conclude)\s+that\b|provide\s+a\s+(?:\w+\s+)?proof)",
    re.I,
)
ASKED = re.compile(
    r"\b(?:find|determine|compute|calculate|evaluate|simplify|solve|what|how (?:many|much)|"
    r"express)\b",
    re.I,
)


def form_of(text: str, answer: str) -> str:
    """``multiple choice``, ``true/false``, ``proof``, or "" for a question with a free answer.

    >>> form_of("What is 7*6?\\n(A) 42\\n(B) 13\\n(C) 7", "A"), form_of("What is 7*6?", "42")
    ('multiple choice', '')
    >>> form_of("Is 7 prime?", "Yes"), form_of("Prove that 2 is prime.", "by definition")
    ('true/false', 'proof')
    """
    if _is_multiple_choice(text, answer):
        return "multiple choice"
    said = answer.strip(" .$\n").lower()
    is_statement = "statement" in text.lower()
    if TWO_ANSWERS.fullmatch(said) or (said in ("t", "f") and is_statement):
        return "true/false"
    if TWO_CHOICES.search(text) and not PROGRAM.search(text):
        return "true/false"
    if PROOF.search(text) and not ASKED.search(text):
        return "proof"
    return ""


def _is_multiple_choice(text: str, answer: str) -> bool:
    labels = [pattern.findall(text) for pattern in LABELS]
    if max(map(_options, labels)) < 2:
        return bool(CHOICE.search(text) and LETTER.fullmatch(answer.strip()))
    # Parts of a question are labelled, too, mostly by small letters.
    capital = max(_options([one for one in found if one.isupper()]) for found in labels)
    return capital > 2 or bool(LETTER.fullmatch(answer.strip()) or CHOICE.search(text))


def _options(labels: list[str]) -> int:
    """Length of the longest run A, B, C, ... of labels in order."""
    most = run = 0
    for label in labels:
        place = ord(label.lower()) - ord("a")
        run = run + 1 if place == run else int(place == 0)
        most = max(most, run)
    return most


DISCIPLINES = {
    ("mathematics", "calculus"): r"integral|\\int|derivative|\\lim|limit of|differentia|converge|"
    r"taylor|antiderivative",
    ("mathematics", "geometry"): r"triangle|circle|radius|polygon|angles?\b|rectang|perimeter|"
    r"area of|sphere|quadrilateral|diagonal|parallelogram|cylinder|cone\b",
    ("mathematics", "probability and counting"): r"probabilit|how many ways|permutation|dice\b|"
    r"die\b|coins?\b|binom|arrangement|at random|expected (?:value|number)|combinations?\b",
    ("mathematics", "number theory"): r"primes?\b|divisor|divisible|remainder|modulo?\b|gcd\b|"
    r"lcm\b|greatest common|least common|coprime|digits? of",
    ("mathematics", "linear algebra"): r"matri(?:x|ces)\b|eigenv|determinant|vector space|"
    r"pmatrix|orthogonal",
    ("mathematics", "algebra"): r"equation|polynomial|solve for|roots? of|factor|simplify|"
    r"expression|inequalit|function\b|logarithm|log\b|sequence\b|frac|sqrt|f\(x\)|domain of",
    ("science", "physics"): r"velocity|accelerat|joules?\b|newtons?\b|voltage|momentum|"
    r"wavelength|photon|friction|gravit|resistor|electric",
    ("science", "chemistry"): r"molar|moles?\b|reaction|acids?\b|compound|atoms?\b|molecul|"
    r"chemical|oxid|isotope",
    ("science", "biology"): r"cells?\b|genes?\b|genetic|protein|species|enzyme|dna\b|organism|"
    r"bacteri",
    ("mathematics", "word problems"): r"how (?:many|much)|per (?:hour|day|week|minute)|total\b|"
    r"percent|costs?\b",
    ("mathematics", "arithmetic"): r"sums? of|product of|max\(|calculate|compute",
}
"""(Domain, discipline) → starts of words in lower-case text. The one with the most hits counts, the
first of equals."""

COMPUTED = re.compile(r"\d\s*(?:[-+*/×÷^]|\\times|\\div|\\cdot)\s*\(?-?\d")
"""A computation on two numbers: arithmetic, if the words say nothing."""

_RULES = {one: re.compile(rf"(?<![a-z])(?:{words})") for one, words in DISCIPLINES.items()}


def subject_of(text: str, tags: dict[str, str]) -> tuple[str, str]:
    """Domain and discipline: those that the tags give, or else by the words of the text.

    >>> subject_of("Find the area of a triangle with sides 3, 4 and 5.", {})
    ('mathematics', 'geometry')
    >>> subject_of("7*6=", {"domain": "sums"})
    ('sums', 'arithmetic')
    """
    if PROGRAM.search(text):
        return tags.get("domain", "code"), tags.get("discipline", "programming")
    lowered = text.lower()
    hits = {one: len(rule.findall(lowered)) for one, rule in _RULES.items()}
    best = max(hits, key=lambda one: hits[one])
    domain, discipline = best
    if not hits[best]:
        is_sum = COMPUTED.search(text)
        domain, discipline = ("mathematics", "arithmetic") if is_sum else ("other", "other")
    return tags.get("domain", domain), tags.get("discipline", discipline)
