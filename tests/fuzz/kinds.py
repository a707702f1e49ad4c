"""The kinds of input that are fuzzed: sound files, how they are changed, and what reads them.

Files that others wrote stand here; what atd writes and reads again is in `tests.fuzz.outputs`.
"""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from zlib import crc32

import jax
import numpy as np
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from atd.checkpoint.conversation import read_conversation, write_conversation
from atd.checkpoint.files import read_prompts, read_text
from atd.checkpoint.reader import open_tokenizer
from atd.checkpoint.safetensors import INDEX, SINGLE
from atd.exports.bit_ttt import export_bit_ttt
from atd.ir import Graph
from atd.models import execute, frontend
from atd.models.random_model import SHAPES, random_graph
from atd.pipeline.recipe import CONFIGS, read_recipe
from tests.fuzz.gguf_bytes import ALIGNMENT, bytes_of, changer, tree_of
from tests.fuzz.mutate import Mutator, change_bytes, change_json, change_lines
from tests.fuzz.watch import SECONDS, Fault
from tests.golden.write_gguf import (
    GOLDEN,
    TERNARY_CONFIG,
    ternary_model,
    write_gguf,
    write_model,
)

TEXT = "Once upon a time, <s> there was a café 漢 🦊.\n  The end</s>"
FIRST_PART = "model-00001-of-00003.gguf"
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        make: writes sound files into an empty folder, and returns a mutator of each that is
            changed, by its path in the folder.
        read: reads the folder; raises `Fault` where it takes what it should refuse.
        writes: whether it may write into the folder.
        seconds: that `read` may take.
    """

    name: str
    make: Callable[[Path], dict[str, Mutator]]
    read: Callable[[Path], object]
    writes: bool = False
    seconds: float = SECONDS


# --- readers --------------------------------------------------------------------------------------


def read_model(path: Path) -> Graph:
    """Opens a model and loads all of its weights."""
    graph = frontend.open(path)
    str(graph)
    for _, ref in graph.weights():
        ref.load().dequantize()
    return graph


def run_model(path: Path) -> None:
    """Opens a model and runs it on shapes alone."""
    graph = read_model(path)
    x, embedding = jax.ShapeDtypeStruct((1, 4), np.int32), None
    for unit in graph.units:
        weights = {
            node.name: {slot: ref.load() for slot, ref in node.weights.items()}
            for node in unit.nodes
        }
        if embedding is None:
            embed = next(node for node in unit.nodes if node.op == "embed")
            embedding = weights[embed.name]["weight"]

        def run(weights, x, embedding, unit=unit):
            return execute.output(unit, weights, x, embedding=embedding, backend="xla")

        x = jax.eval_shape(run, weights, x, embedding)


def read_tokenizer(path: Path) -> None:
    """Opens a tokenizer, and uses it."""
    tokenizer = open_tokenizer(path)
    ids = tokenizer.encode(TEXT)
    tokenizer.decode([*ids, *tokenizer.eos_ids])
    tokenizer.decode(range(min(tokenizer.vocabulary_size, 600)), special=True)
    tokenizer.apply_chat(CHAT)


def read_pipeline(folder: Path) -> None:
    """Reads a recipe, writes it with all its options, and checks it on a model."""
    recipe = read_recipe(folder / "recipe.toml")
    text = recipe.to_toml()
    match crc32(text.encode()) % 8:  # the rest takes ten times as long
        case 0:
            recipe.pipeline.preflight(_small_graph())
        case 1:
            (folder / "again.toml").write_text(text)
            if read_recipe(folder / "again.toml").to_toml() != text:
                raise Fault(f"{text!r} is read back as another recipe")


@cache
def _small_graph() -> Graph:
    return random_graph(SHAPES["tiny"])


# --- models ---------------------------------------------------------------------------------------


def golden(folder: Path, name: str) -> None:
    """Copies a small model."""
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    (folder / "logits.npz").unlink()


def _safetensors(folder: Path) -> dict[str, Mutator]:
    golden(folder, "llama_bias")
    return {SINGLE: change_safetensors}


def change_safetensors(random: Random, data: bytes) -> bytes:
    """Changes the header, of the length that is said or another, or any bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    match random.randrange(4):
        case 0 | 1:
            header = change_json(random, data[8 : 8 + length])
            return struct.pack("<Q", len(header)) + header + data[8 + length :]
        case 2:
            return change_bytes(random, data[: 8 + length]) + data[8 + length :]
        case _:
            return change_bytes(random, data)


def _index(folder: Path) -> dict[str, Mutator]:
    golden(folder, "mistral")
    return {INDEX: change_json}


def _config(folder: Path) -> dict[str, Mutator]:
    golden(folder, "qwen3")
    config = json.loads((folder / "config.json").read_text())
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    more = {
        "rope_scaling": scaling,
        "attention_bias": False,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "eos_token_id": [1, 2],
    }
    (folder / "config.json").write_text(json.dumps(more | config | more))
    return {"config.json": change_json}


def _bitnet(name: str) -> Callable[[Path], dict[str, Mutator]]:
    """Makes a checkpoint of Hugging Face's bitnet."""

    def make(folder: Path) -> dict[str, Mutator]:
        golden(folder, name)
        return {"config.json": change_json, SINGLE: change_safetensors}

    return make


def _bit_ttt(folder: Path) -> dict[str, Mutator]:
    """A folder of Bit-TTT-Engine with two bases."""
    golden(folder / "source", "bitnet_llama")
    out = export_bit_ttt(folder / "source", folder / "out", say=lambda line: None)
    tensors = load_file(out / SINGLE)
    for name, array in tensors.items():
        if name.endswith((".weight_packed", ".scales")):
            tensors[name] = np.repeat(array, 2, axis=-1)
    save_file(tensors, out / SINGLE)
    return {"out/config.json": change_json, f"out/{SINGLE}": change_safetensors}


def _gguf(folder: Path) -> dict[str, Mutator]:
    file = folder / "model.gguf"
    write_gguf(file, "llama_bias", GGMLQuantizationType.Q8_0)
    tree, data = tree_of(file)
    tree["metadata"] |= {"general.alignment": ALIGNMENT, "tokenizer.ggml.tokens": ["a"]}
    file.write_bytes(bytes_of(tree, data))
    return {file.name: changer(tree, data)}


def _ternary_gguf(folder: Path) -> dict[str, Mutator]:
    """A model with ternary matrices, whose codes are changed too."""
    file = folder / "model.gguf"
    write_model(file, TERNARY_CONFIG, ternary_model(), GGMLQuantizationType.TQ1_0)
    change = changer(*tree_of(file))

    def changed(random: Random, data: bytes) -> bytes:
        return (change if random.random() < 0.6 else change_bytes)(random, data)

    return {file.name: changed}


def _split_gguf(folder: Path) -> dict[str, Mutator]:
    """A model with ternary matrices, in three parts."""
    file, kind = folder / "model.gguf", GGMLQuantizationType.TQ2_0
    write_model(file, TERNARY_CONFIG, ternary_model(), kind, split_max_tensors=4)
    first, second, _ = sorted(folder.glob("*.gguf"))
    tree, data = tree_of(first)
    tree["metadata"] |= {"tokenizer.ggml.tokens": ["a"]}
    first.write_bytes(bytes_of(tree, data))
    return {first.name: changer(tree, data), second.name: changer(*tree_of(second))}


# --- tokenizers -----------------------------------------------------------------------------------


def _byte_level(folder: Path) -> dict[str, Mutator]:
    return _vocabulary(
        folder,
        {
            "model": "gpt2",
            "pre": "llama-bpe",
            "tokens": [*sorted(ByteLevel.alphabet()), "ab", "<|begin|>", "<|end|>"],
            "token_type": [1] * 257 + [3, 3],
            "merges": ["a b"],
            "bos_token_id": 257,
            "eos_token_id": 258,
            "add_bos_token": True,
        },
    )


def _vocabulary(folder: Path, ggml: dict) -> dict[str, Mutator]:
    metadata = {f"tokenizer.ggml.{key}": item for key, item in ggml.items()}
    metadata["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0].content }}"
    tree = {"version": 3, "metadata": metadata, "tensors": []}
    (folder / "model.gguf").write_bytes(bytes_of(tree))
    return {"model.gguf": changer(tree, b"")}


def _sentencepiece(folder: Path) -> dict[str, Mutator]:
    pieces = ["▁", "a", "b", "ab", "▁a", "▁ab"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return _vocabulary(
        folder,
        {
            "model": "llama",
            "tokens": tokens,
            "scores": [float(-i) for i in range(len(tokens))],
            "token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unknown_token_id": 0,
            "add_space_prefix": True,
        },
    )


def tokenizer(folder: Path) -> dict[str, Mutator]:
    """Writes a tokenizer with all files that one can have but the template's."""
    shutil.copy(GOLDEN / "stories" / "tokenizer.json", folder)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    texts = {
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", "lstrip": False},
            "add_bos_token": True,
            "added_tokens_decoder": {
                "1": {"content": "<s>", "special": True, "normalized": False},
                "512": {"content": "<|new|>", "special": True, "single_word": False},
            },
            "chat_template": [{"name": "default", "template": template}],
        },
        "special_tokens_map.json": {"unk_token": "<unk>", "pad_token": {"content": "<s>"}},
        "added_tokens.json": {"<|new|>": 512, "<|other|>": 513},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2, 512]},
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content))
    return {"tokenizer.json": change_json, **dict.fromkeys(texts, change_json)}


def _template(folder: Path) -> dict[str, Mutator]:
    tokenizer(folder)
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' and loop.index < 8 %}"
        "{{ '[INST] ' + m['content'] | trim }}{% else %}{% generation %}{{ m.content[:-1] * 2 }}"
        "{% endgeneration %}{% set x = namespace(n=range(3) | sum) %}{{ x.n ** 2 | tojson }}"
        "{{ strftime_now('%Y') }}{% endif %}{% endfor %}"
    )
    return {"chat_template.jinja": change_bytes}


# --- recipes and texts ----------------------------------------------------------------------------


def _recipe(folder: Path) -> dict[str, Mutator]:
    """All recipes that ship, with all their options, one after the other."""
    texts = [read_recipe(file).to_toml().encode() for file in sorted(CONFIGS.glob("*.toml"))]
    (folder / "recipe.toml").write_bytes(texts[0])
    rule = b"\n[[passes.rules]]\nmatch = 'model.*q_proj'\n"

    def change(random: Random, sound: bytes) -> bytes:
        text = random.choice(texts)
        if random.random() < 0.3:
            text = text.replace(b'name = "pack"', b'name = "pack"' + rule)
        return change_lines(random, text)

    return {"recipe.toml": change}


def _text(folder: Path) -> dict[str, Mutator]:
    rows = [{"text": f"Once upon a time {i}.", "id": i} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def change(random: Random, sound: bytes) -> bytes:
        lines = sound.splitlines()
        at = random.randrange(len(lines))
        lines[at] = change_json(random, lines[at])
        return (
            change_bytes(random, b"\n".join(lines)) if random.random() < 0.5 else b"\n".join(lines)
        )

    return {"rows.jsonl": change}


def _conversation(folder: Path) -> dict[str, Mutator]:
    said = [{"role": "user" if i % 2 else "assistant", "content": f"{i}."} for i in range(6)]
    write_conversation(folder / "talk.json", "stories", said)
    return {"talk.json": change_json}


KINDS = (
    Kind("safetensors", _safetensors, read_model),
    Kind("index.json", _index, read_model),
    Kind("config.json", _config, run_model),
    Kind("bitnet", _bitnet("bitnet_norms"), run_model),
    Kind("bitnet 2B-4T", _bitnet("bitnet_2b4t"), run_model),
    Kind("bitnet online", _bitnet("bitnet_online"), run_model),
    Kind("Bit-TTT", _bit_ttt, lambda folder: run_model(folder / "out")),
    Kind("GGUF", _gguf, lambda folder: read_model(folder / "model.gguf")),
    Kind("GGUF ternary", _ternary_gguf, lambda folder: read_model(folder / "model.gguf")),
    Kind("GGUF parts", _split_gguf, lambda folder: read_model(folder / FIRST_PART)),
    Kind("GGUF BPE", _byte_level, lambda folder: read_tokenizer(folder / "model.gguf")),
    Kind("GGUF pieces", _sentencepiece, lambda folder: read_tokenizer(folder / "model.gguf")),
    Kind("tokenizer", tokenizer, read_tokenizer),
    Kind("chat template", _template, read_tokenizer),
    Kind("recipe", _recipe, read_pipeline, writes=True),
    Kind("JSON Lines", _text, lambda folder: read_text(folder / "rows.jsonl")),
    Kind("prompts", _text, lambda folder: read_prompts(folder / "rows.jsonl")),
    Kind("conversation", _conversation, lambda folder: read_conversation(folder / "talk.json")),
)
