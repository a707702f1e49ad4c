"""Makes the model tests/golden/stories: a llama of 260 thousand weights and its tokenizer, trained
on tests/stories.py.

    python -m tests.golden.make_stories [--figures]

Takes some minutes on two cores; --figures only computes tests/golden/stories.npz anew: logits, a
greedy continuation and perplexities, by the forward pass below, which shares nothing with the
package. Trained weights have what random ones lack, and what calibration, allocation and rotation
live on: correlated inputs of very different sizes, outliers, losses that differ by layer."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

from tests.stories import stories, text

HERE = Path(__file__).parent / "stories"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "vocab_size": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}
WIDTH, LAYERS, HEADS, KV_HEADS, HEAD = 64, 5, 8, 4, 8
SPECIAL = ["<unk>", "<s>", "</s>"]
CHARACTERS, SEED = 3_000_000, 1
STEPS, BATCH, CONTEXT = 1000, 8, 256


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Returns a tokenizer like Llama 2's: pieces with ▁ for a blank, bytes for all else."""
    blanks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = blanks
    alphabet = sorted(set("".join(texts)) - {" ", "\n"})
    pieces = 512 - len(SPECIAL) - 256
    words = [word for text in texts for word in text.replace("\n", " ").split(" ")]
    trainer = trainers.BpeTrainer(
        vocab_size=pieces, initial_alphabet=["▁", *alphabet], show_progress=False
    )
    bpe.train_from_iterator(words, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merged = ["".join(merge) for merge in learned["merges"]]
    letters = [piece for piece in learned["vocab"] if piece not in set(merged)]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *letters]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    assert len(vocabulary) == len(tokens) == 512
    found = Tokenizer(
        models.BPE(
            vocabulary,
            [tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    found.normalizer = blanks
    found.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    found.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    found.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return found


def initial(seed: int) -> dict[str, np.ndarray]:
    rng, weights = np.random.default_rng(seed), {}

    def normal(name: str, out: int, inputs: int) -> None:
        weights[f"{name}.weight"] = (0.02 * rng.standard_normal((out, inputs))).astype(np.float32)

    normal("model.embed_tokens", 512, WIDTH)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, out, inputs in (
            ("self_attn.q_proj", HEADS * HEAD, WIDTH),
            ("self_attn.k_proj", KV_HEADS * HEAD, WIDTH),
            ("self_attn.v_proj", KV_HEADS * HEAD, WIDTH),
            ("self_attn.o_proj", WIDTH, HEADS * HEAD),
            ("mlp.gate_proj", 172, WIDTH),
            ("mlp.up_proj", 172, WIDTH),
            ("mlp.down_proj", WIDTH, 172),
        ):
            normal(f"{layer}.{name}", out, inputs)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{name}.weight"] = np.ones(WIDTH, np.float32)
    weights["model.norm.weight"] = np.ones(WIDTH, np.float32)
    return weights


def logits(weights: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    batch, length = tokens.shape
    angles = np.arange(length)[:, None] / 10000 ** (np.arange(0, HEAD, 2) / HEAD)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def rope(x):
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def norm(x, name):
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * weights[name]

    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"

        def linear(x, name, layer=layer):
            return x @ weights[f"{layer}.{name}_proj.weight"].T

        y = norm(x, f"{layer}.input_layernorm.weight")
        q, k, v = (
            linear(y, f"self_attn.{n}").reshape(batch, length, -1, HEAD) for n in ("q", "k", "v")
        )
        y = jax.nn.dot_product_attention(rope(q), rope(k), v, is_causal=True)
        x = x + linear(y.reshape(batch, length, -1), "self_attn.o")
        y = norm(x, f"{layer}.post_attention_layernorm.weight")
        y = jax.nn.silu(linear(y, "mlp.gate")) * linear(y, "mlp.up")
        x = x + linear(y, "mlp.down")
    return norm(x, "model.norm.weight") @ weights["model.embed_tokens.weight"].T


def train(stream: np.ndarray) -> dict[str, np.ndarray]:
    """Returns what AdamW makes of the initial weights, with a learning rate that falls along a
    cosine.
    """
    weights = jax.tree.map(jnp.asarray, initial(seed=0))
    rate = optax.warmup_cosine_decay_schedule(0.0, 4e-3, 100, STEPS, 1e-5)
    descent = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.1)
    )

    @jax.jit
    def step(weights, state, tokens):
        def loss(weights):
            scores = logits(weights, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:]).mean()

        value, slope = jax.value_and_grad(loss)(weights)
        moves, state = descent.update(slope, state, weights)
        return optax.apply_updates(weights, moves), state, value

    state, rng = descent.init(weights), np.random.default_rng(0)
    for i in range(STEPS):
        starts = rng.integers(0, len(stream) - CONTEXT - 1, BATCH)
        tokens = np.stack([stream[start : start + CONTEXT + 1] for start in starts])
        weights, state, value = step(weights, state, tokens)
        if i % 100 == 0 or i == STEPS - 1:
            print(f"step {i}: loss {value:.3f}, perplexity {np.exp(value):.2f}", flush=True)
    return {name: np.asarray(array) for name, array in weights.items()}


def tokens_of(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Returns documents of one to four stories a line apart, each behind a BOS."""
    rng, ids, at = np.random.default_rng(0), [], 0
    while at < len(texts):
        count = int(rng.integers(1, 5))
        ids += tokenizer.encode("\n".join(texts[at : at + count])).ids
        at += count
    return np.array(ids, np.int32)


def perplexity(weights: dict[str, jax.Array], windows: np.ndarray) -> float:
    scores = jnp.concatenate([logits(weights, window[None, :-1]) for window in windows])
    return float(
        jnp.exp(optax.softmax_cross_entropy_with_integer_labels(scores, windows[:, 1:]).mean())
    )


def write_figures() -> None:
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    weights = {
        name: jnp.asarray(array, jnp.float32)
        for name, array in load_file(HERE / "model.safetensors").items()
    }
    ids = np.array(tokenizer.encode(text(30_000, 3), add_special_tokens=False).ids, np.int32)
    windows = ids[: len(ids) // 256 * 256].reshape(-1, 256)
    behind_bos = ids[: len(ids) // 255 * 255].reshape(-1, 255)
    behind_bos = np.concatenate([np.full((len(behind_bos), 1), 1, np.int32), behind_bos], axis=1)
    told = tokenizer.encode("Once upon a time").ids
    for _ in range(16):
        told.append(int(logits(weights, jnp.array([told]))[0, -1].argmax()))
    tokens = np.array([tokenizer.encode(text(400, 4)).ids[:32]], np.int32)
    figures = {
        "tokens": tokens,
        "logits": np.asarray(logits(weights, jnp.asarray(tokens))),
        "told": np.array(told, np.int32),
        "perplexity": np.array([perplexity(weights, w) for w in (windows, behind_bos)]),
    }
    np.savez_compressed(HERE.with_suffix(".npz"), **figures)
    print(f"perplexity without and with BOS: {figures['perplexity']}")
    print(tokenizer.decode(told))


def main() -> None:
    HERE.mkdir(exist_ok=True)
    texts = stories(CHARACTERS, SEED)
    tokenizer = train_tokenizer(texts)
    tokenizer.save(str(HERE / "tokenizer.json"))
    stream = tokens_of(tokenizer, texts)
    print(f"{len(stream):,} tokens, {len(stream) / len(texts):.0f} per story")
    weights = {name: array.astype(np.float16) for name, array in train(stream).items()}
    save_file(weights, HERE / "model.safetensors", metadata={"format": "pt"})
    (HERE / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (HERE / "tokenizer_config.json").write_text(json.dumps(words) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--figures"]:
        main()
    write_figures()
