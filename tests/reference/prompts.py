"""Forty prompts of one to fifteen hundred tokens: plain and chat, several languages, code, digits, odd characters."""

PLAIN = {
    "one-token": "Hello",
    "newline": "\n",
    "capital": "The capital of France is",
    "how-are-you": "How are you today?",
    "counting": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,",
    "digits": "3.14159265358979323846 2.71828182845904523536 1.41421356237309504880",
    "german": "Die Donau entspringt im Schwarzwald und fließt durch zehn Länder, bevor sie",
    "french": "Le petit déjeuner est servi de sept heures à dix heures, sauf le dimanche où",
    "spanish": "Había una vez un pescador que vivía junto al mar y cada mañana",
    "chinese": "北京是中华人民共和国的首都,它的历史",
    "japanese": "昔々あるところに、おじいさんとおばあさんが住んでいました。",
    "arabic": "القاهرة هي عاصمة مصر وأكبر مدنها",
    "russian": "Зимой в лесу тихо, и только иногда",
    "hindi": "भारत की राजधानी नई दिल्ली है और",
    "greek": "Η Αθήνα είναι η πρωτεύουσα της Ελλάδας και",
    "emoji": "Weather report: 🌧️🌧️☀️ Mood: 🙂🙃😴 Snack: 🍎🍌",
    "python": "def fibonacci(n: int) -> int:\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "rust": "fn main() {\n    let mut total: u64 = 0;\n    for i in 0..100 {\n",
    "sql": "SELECT customer, SUM(amount) AS total\nFROM orders\nWHERE placed_at >= '2024-01-01'\nGROUP BY",
    "json": '{"name": "Ada", "languages": ["English", "French"], "born": 1815, "works": [',
    "html": "<!DOCTYPE html>\n<html>\n<head>\n  <title>Bakery</title>\n</head>\n<body>\n  <h1>",
    "whitespace": "a    b\t\tc\n\n\n    d   ",
    "shouting": "ATTENTION ALL PASSENGERS: THE TRAIN ON PLATFORM",
    "poem": "The lamp is low, the tide is slow,\nThe boats come home at",
}

CHAT = {
    "chat-hello": [{"role": "user", "content": "Hi!"}],
    "chat-capital": [{"role": "user", "content": "What is the capital of Italy, and what river runs through it?"}],
    "chat-system": [
        {"role": "system", "content": "You are a terse assistant. Answer in one sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    "chat-turns": [
        {"role": "user", "content": "I have two apples and buy three more."},
        {"role": "assistant", "content": "Then you have five apples."},
        {"role": "user", "content": "I eat one. How many are left?"},
    ],
    "chat-french": [{"role": "user", "content": "Écris une phrase sur la mer en français."}],
    "chat-code": [{"role": "user", "content": "Write a Python function that reverses a string."}],
    "chat-unicode": [{"role": "user", "content": "Translate to English: „Übung macht den Meister“ 🥇"}],
}

# Sentences with slots, so that long prompts are prose that does not repeat word for word.
_FRAMES = [
    "The {a} near the {p} was built in {n} by people who knew little of {t}.",
    "Every {d} the {w} carries {n} letters across the {p} and never once complains about {t}.",
    "Nobody in the {p} could say why the {a} had {n} windows, though many had asked the {w}.",
    "When the {w} speaks of {t}, the whole {p} falls silent for about {n} seconds.",
    "On {d} they count the {a} again, and again the sum is {n}, which pleases the {w}.",
    "It is said that {t} began in a {p} with {n} chairs and a single {a}.",
]
_A = ["lighthouse", "bridge", "granary", "clock tower", "mill", "library", "harbour wall"]
_P = ["valley", "market", "old town", "river bend", "northern shore", "orchard"]
_W = ["postman", "miller", "teacher", "ferryman", "gardener"]
_T = ["arithmetic", "the sea", "printing", "bees", "long division", "weather", "glass making", "maps"]
_D = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "market day"]


def prose(n_sentences: int, start: int) -> str:
    """Sentences that differ from each other, from a plain linear congruence."""
    words, state = [], start
    for _ in range(n_sentences):
        state = (state * 1103515245 + 12345) % (1 << 31)
        pick = lambda items, shift: items[(state >> shift) % len(items)]
        words.append(pick(_FRAMES, 4).format(a=pick(_A, 7), p=pick(_P, 10), w=pick(_W, 13), t=pick(_T, 16),
                                             d=pick(_D, 19), n=1 + (state >> 9) % 2000))
    return " ".join(words)


# Cut to exactly this many tokens: around block boundaries of 16, and long.
EXACT = {"exact-15": 15, "exact-16": 16, "exact-17": 17, "exact-64": 64, "exact-255": 255, "exact-300": 300,
         "exact-700": 700, "exact-1000": 1000, "exact-1500": 1500}
