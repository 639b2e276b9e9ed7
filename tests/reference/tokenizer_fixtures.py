"""Writes crates/text/tests/fixtures/{smollm2,sentencepiece}.json: what other tokenizers make of some 250 texts.

    python tests/reference/tokenizer_fixtures.py SmolLM2-135M-Instruct.Q4_1.gguf

Needs transformers, tokenizers, gguf, regex and sentencepiece. The ids of the GGUF file's vocabulary come from Hugging
Face's tokenizer for the file, set to the pre-tokenizer that the model was published with (transformers itself takes
plain GPT-2 for it), and are checked against an implementation in pure Python below. The sentencepiece vocabulary is
trained here on these very texts, with Llama 2's settings, and the ids are sentencepiece's own.
"""
import io
import json
import random
import sys
from pathlib import Path

import gguf
import regex
import sentencepiece
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoTokenizer

FIXTURES = Path(__file__).parents[2] / "crates/text/tests/fixtures"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLITS = {"gpt-2": GPT2, "llama-bpe": LLAMA3, "qwen2": LLAMA3.replace("{1,3}", "")}

SENTENCES = """
The quick brown fox jumps over the lazy dog.
Die Größe der Straße überraschte Jürgen; „schön“, sagte er.
Où est la bibliothèque ? Ça m'a coûté 12,50 €.
El niño comió piñas — ¡qué rico! ¿Cuántos años tienes?
A raposa não saiu; o coração é vermelho.
Příliš žluťoučký kůň úpěl ďábelské ódy.
Zażółć gęślą jaźń.
Pchnąć w tę łódź jeża lub ośm skrzyń fig.
İstanbul'da ılık bir çay içtim, şu ağaç.
Съешь же ещё этих мягких французских булок.
Щедрі ґанки їхньої землі.
Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.
צפה יום טוב, שלום עולם!
السلام عليكم ورحمة الله ١٢٣٤٥
فارسی را پاس بداریم ۱۲۳
हिन्दी में नमस्ते दुनिया १२३
বাংলা ভাষা সুন্দর
தமிழ் மொழி இனிமையானது
తెలుగు భాష
ภาษาไทยไม่มีช่องว่าง
Tiếng Việt có dấu thanh điệu
日本語のテキストです。カタカナ、ひらがな、漢字。
今天天气很好，我们去公园吧！
繁體中文測試：臺灣
한국어 문장입니다. 안녕하세요?
ქართული ენა და ანბანი
Հայերեն այբուբեն
አማርኛ ፊደል
𝕌𝕟𝕚𝕔𝕠𝕕𝕖 𝓶𝓪𝓽𝓱 𝔱𝔢𝔵𝔱
ﬁne ﬂow ﬀ ligatures
ＡＢＣ　１２３ ｶﾀｶﾅ
naïve café résumé coöperate façade
nai\u0308ve cafe\u0301 re\u0301sume\u0301
Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!
I'm, you're, he's, we'll, they've, I'd, can't, o'clock
I'M YOU'RE HE'S WE'LL THEY'VE I'D CAN'T
it’s with a curly apostrophe, isn’t it
""".strip().split("\n")
PIECES = [
    "", " ", "  ", "   ", "\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", "\t", "\t\t", " \n", "\n ", " \t \n \t ", "\u00a0", "\u3000", "\u2003x",
    "\u200b", "\ufeff", "\ufeffbom", "\u2028line\u2029para", "\x00", "a\x00b", "\x01\x02\x03\x1f\x7f", "\x85", "\x1b[31mred\x1b[0m", "\u202eabc\u202c",
    "\ufffd", "\ufffd\ufffd", "\U0010ffff", "\ue000", "\u0378", "\U000e0001",
    "a", "ab", "A", "z" * 50, "abc" * 40, "a" * 300, "!" * 100, "=" * 80, "-" * 79, " " * 100, "\n" * 40, "\t" * 20, "." * 5 + " " * 5, "ab" * 200,
    " hello", "hello ", " hello ", "  hello  world  ", "hello\n", "\nhello", "hello\n\nworld", "hello \n world", "hello\r\nworld\r\n", "hello   world\n\n\n  x",
    "0", "1", "12", "123", "1234", "12345", "1234567890", " 1", " 12", "  12", "   123", "a1", "1a", "a 1 b 22 c 333", "3.14159", "1,234,567.89",
    "-1", "+1", "1e10", "0xDEADBEEF", "0b1010", "2024-01-31T23:59:59Z", "12:34", "100%", "$99.99", "½ ² ³ ① Ⅷ", "x²+y²=z²", "H₂O", "1st 2nd 3rd", "٣٤٥", "五六七",
    "'s", "'S", " 's", "''s", "'", "''", "'ll", "x'y", "don't", "DON'T", "'ſ", "ſ",
    "😀", "😀😀😀", "👍🏽", "👨\u200d👩\u200d👧\u200d👦", "🇩🇪🇯🇵", "❤️", "🥇 first", "text😀text", " 😀", "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "e\u0301", "\u0301", "a\u0301\u0302\u0303", "가", "\u1100\u1161", "Å", "\u212b", "A\u030a", "ǅ", "ß", "ẞ",
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_start|><|im_end|>", "a<|im_end|>b", " <|im_end|> ", "<|im_end|>\n", "<|im_end", "|im_end|>", "<|IM_END|>",
    "<repo_name>x<file_sep>", "<issue_start><issue_comment>hi<issue_closed>", "<jupyter_code>print(1)<jupyter_output>1", "<filename>a.py", "<gh_stars>0", "<|<|im_start|>|>",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello [/INST] Hi </s>", "<unk>", "<s>", "</s>", "<0x0A>", "<think>\nok\n</think>", "<tool_call>{\"name\": \"f\"}</tool_call>",
    "def f(x):\n    return x + 1\n", "def f(x):\n\tif x:\n\t\treturn {'a': [1, 2, 3]}\n", "for (int i = 0; i < n; ++i) {\n    a[i] += b[i] * 2.5f;\n}\n",
    "fn main() { println!(\"{}\", vec![1, 2].iter().map(|x| x * 2).sum::<i32>()); }", "SELECT * FROM t WHERE a >= 10 AND b <> 'x''y';", "#include <stdio.h>\n",
    "<html><body class=\"a b\">&nbsp;&lt;x&gt;</body></html>", "{\"key\": [1, 2.5, null, true], \"é\": \"\\u00e9\"}", "a: 1\nb:\n  - c\n  - d\n", "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "# Title\n\n* item\n* item\n\n```rust\nlet x = 1;\n```\n", "http://example.org/a/b?c=d&e=f#g", "user.name+tag@example.co.uk", "C:\\Users\\x\\file.txt", "/usr/lib/x86_64-linux-gnu",
    "camelCaseIdentifier", "snake_case_identifier", "SCREAMING_SNAKE_CASE", "kebab-case-name", "HTTPServerError404", "iPhone15ProMax", "x=y+z", "a&&b||!c", "a->b::c", "i++ + ++j", "/* c */ // d", "\\n\\t\\\\", "\"quoted\" 'single' `back`",
    "$\\int_0^\\infty e^{-x^2} dx = \\frac{\\sqrt{\\pi}}{2}$", "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋", "←↑→↓ ■□▲△ ★☆ ♠♣♥♦", "┌─┐│└┘", "…—–‘’“”•", "©®™°±µ¶", "¥£€¢₿",
    "word word word word", "The the THE tHe", "   leading", "trailing   ", "a  b   c    d     e", "a\tb\t\tc", "x \n y \n\n z", "a\n b\n  c\n   d\n    e", "\n\n  \n", " \n \n ", "end.\n\nStart", "Mr. Smith went to Washington, D.C. in 1999.",
]


def texts():
    """Sentences, pieces, and random mixtures of both."""
    rng = random.Random(20240229)
    mixed = ["".join(rng.choice(PIECES + SENTENCES + [" ", "\n", "  "])[:40] for _ in range(rng.randint(2, 5))) for _ in range(30)]
    return list(dict.fromkeys([s.encode().decode("unicode_escape") if "\\u0" in s else s for s in SENTENCES] + PIECES + mixed))


def spelling():
    """GPT-2's printable character of each byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (b for b in range(256) if b not in plain)
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


class PurePython:
    """Byte-level BPE, word by word, pair by pair."""

    def __init__(self, vocab, special):
        self.ids = {token: i for i, token in enumerate(vocab["tokens"])}
        self.ranks = {tuple(m.split(" ")): i for i, m in enumerate(vocab["merges"])}
        self.special = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")
        self.spell, self.known = spelling(), set(special)

    def encode(self, text, pre):
        ids = []
        for part in self.special.split(text):
            if part in self.known:
                ids.append(self.ids[part])
                continue
            stretches = regex.split(r"(\p{N})", part) if pre == "smollm" else [part]
            for stretch in stretches:
                for word in regex.findall(SPLITS.get(pre, GPT2), stretch):
                    ids += self.merge(word, whole=pre == "llama-bpe")
        return ids

    def merge(self, word, whole):
        parts = [self.spell[b] for b in word.encode()]
        if whole and "".join(parts) in self.ids:
            return [self.ids["".join(parts)]]
        while len(parts) > 1:
            rank, i = min((self.ranks.get(pair, 1 << 30), i) for i, pair in enumerate(zip(parts, parts[1:])))
            if rank == 1 << 30:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [self.ids[p] for p in parts]


def smollm2(path):
    fields = gguf.GGUFReader(path).fields
    vocab = {key: fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type")}
    special = [t for t, kind in zip(vocab["tokens"], vocab["token_type"]) if kind == 3]
    tokenizer = AutoTokenizer.from_pretrained(Path(path).parent, gguf_file=Path(path).name)
    assert isinstance(tokenizer.bos_token, str)
    pure, out = PurePython(vocab, special), {}
    as_it_comes = [tokenizer(text)["input_ids"] for text in texts()]
    for pre in ("smollm", *SPLITS):
        use(tokenizer.backend_tokenizer, pre)
        cases = [(text, tokenizer(text)["input_ids"]) for text in texts()]
        for (text, ids) in cases:
            text = normalizers.NFC().normalize_str(text) if pre == "qwen2" else text
            # Without `ignore_merges` Hugging Face's tokenizer for the file can't be a second opinion.
            assert ids == pure.encode(text, pre) or pre == "llama-bpe", (pre, text)
        if pre == "llama-bpe":
            cases = [(text, pure.encode(text, pre)) for text, _ in cases]
        # The other splits need not see every text again.
        out[pre] = cases if pre == "smollm" else [c for c, smol in zip(cases, out["smollm"]) if c[1] != smol[1]]
    differing = [text for (text, ids), other in zip(out["smollm"], as_it_comes) if ids != other]
    print(len(out["smollm"]), "texts;", len(differing), "differ with transformers' own choice:", differing[:5])
    use(tokenizer.backend_tokenizer, "smollm")
    return {"encode": out, "decode": decoded(tokenizer.backend_tokenizer)}


def use(backend, pre):
    """Sets a published pre-tokenizer."""
    digits, gpt2 = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.normalizer = normalizers.NFC() if pre == "qwen2" else None
    if pre in ("llama-bpe", "qwen2"):
        split = pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2]) if pre == "smollm" else gpt2


def decoded(backend):
    """Random ids, many of them incomplete characters and special tokens: with special tokens, without them."""
    rng, out = random.Random(7), []
    for _ in range(60):
        ids = [rng.choice([rng.randrange(49152), rng.randrange(17, 300), rng.randrange(17)]) for _ in range(rng.randint(1, 12))]
        out.append([ids, backend.decode(ids, skip_special_tokens=False), backend.decode(ids, skip_special_tokens=True)])
    return out


def sentencepiece_cases():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((SENTENCES + [p for p in PIECES if "\0" not in p]) * 3), model_writer=model, model_type="bpe", vocab_size=900,
        byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    n = range(processor.get_piece_size())
    kind = lambda i: 2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
    special = ("<s>", "</s>", "<unk>", "<0x")
    plain = [t for t in texts() if not any(s in t for s in special)]
    return {
        "tokens": [processor.id_to_piece(i) for i in n], "scores": [processor.get_score(i) for i in n], "kinds": [kind(i) for i in n],
        "encode": [(text, processor.encode(text)) for text in plain],
    }


def write(name, value):
    path = FIXTURES / name
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(path.name, path.stat().st_size)


if __name__ == "__main__":
    FIXTURES.mkdir(parents=True, exist_ok=True)
    write("smollm2.json", smollm2(sys.argv[1]))
    write("sentencepiece.json", sentencepiece_cases())
