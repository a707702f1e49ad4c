"""Makes the golden files: tiny random models of each family as Hugging Face folders, with their
float32 logits.

    python tests/golden/make_golden.py [NAME ...]

Needs torch and transformers (5.24 was used), which compute the logits. NAME is one of MODELS or
REAL; without names all are made. The real models lie in data/models; of those only tokens and
logits are kept. Weights are drawn so that every part matters: gains and biases are random, and
logits differ by several units."""
# pyright: reportMissingImports=false

import copy
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "beta_slow": 0.25,
}
# name -> (config.json, dtype). llama_gqa and llama_bias have rope in the old spelling, others in
# transformers 5's.
MODELS = {
    "llama_mha": (
        {
            "model_type": "llama",
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "float32",
    ),
    "llama_gqa": (
        {
            "model_type": "llama",
            "hidden_size": 64,
            "num_key_value_heads": 2,
            "rope_theta": 1e4,
            "rope_scaling": LLAMA3,
            "rms_norm_eps": 1e-5,
        },
        "float32",
    ),
    "llama_bias": (
        {
            "model_type": "llama",
            "num_key_value_heads": 2,
            "rope_scaling": {"type": "linear", "factor": 2.5},
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        "float32",
    ),
    "mistral": (
        {
            "model_type": "mistral",
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e3},
        },
        "bfloat16",
    ),
    "qwen2": (
        {
            "model_type": "qwen2",
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
        },
        "float32",
    ),
    "qwen3": (
        {
            "model_type": "qwen3",
            "num_key_value_heads": 2,
            "head_dim": 12,
            "num_hidden_layers": 3,
            "attention_bias": True,
        },
        "float32",
    ),
    "gemma3": (
        {
            "model_type": "gemma3_text",
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_hidden_layers": 3,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 12,
            "sliding_window": 6,
            "sliding_window_pattern": 2,
            "rope_theta": 1e4,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": True,
        },
        "float32",
    ),
    "llama_yarn": (
        {
            "model_type": "llama",
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_theta": 1e4} | YARN,
        },
        "float32",
    ),
    "llama32": (
        {
            "model_type": "llama",
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_hidden_layers": 1,
            "rope_theta": 5e5,
            "rope_scaling": LLAMA3 | {"factor": 32.0},
            "tie_word_embeddings": True,
        },
        "float32",
    ),
    "qwen3_tied": (
        {
            "model_type": "qwen3",
            "num_key_value_heads": 2,
            "head_dim": 24,
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
            "rope_scaling": YARN,
        },
        "float32",
    ),
    "smollm3": (
        {
            "model_type": "smollm3",
            "num_key_value_heads": 2,
            "num_hidden_layers": 4,
            "intermediate_size": 32,
            "rope_theta": 1e4,
            "tie_word_embeddings": True,
            "pad_token_id": None,
        },
        "float32",
    ),
    "phi3": (
        {
            "model_type": "phi3",
            "num_key_value_heads": 2,
            "head_dim": 16,
            "hidden_size": 64,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 16,
            "rope_theta": 1e3,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0],
            },
            "sliding_window": 9,
            "pad_token_id": None,
        },
        "float32",
    ),
    "granite": (
        {
            "model_type": "granite",
            "num_key_value_heads": 2,
            "attention_bias": True,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.25,
            "logits_scaling": 0.5,
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": True,
        },
        "float32",
    ),
    "olmo2": (
        {
            "model_type": "olmo2",
            "num_key_value_heads": 2,
            "attention_bias": True,
            "rope_theta": 1e4,
        },
        "float32",
    ),
    "gemma2": (
        {
            "model_type": "gemma2",
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_hidden_layers": 3,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 12,
            "sliding_window": 6,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 30.0,
            "rope_theta": 1e4,
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": True,
        },
        "float32",
    ),
}
SHORT = 12  # tokens of the second logits of phi3, whose rope depends on the length
REAL = ("stories260K", "stories15M")


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data = 1 + 0.3 * noise
        elif name.endswith("bias"):
            parameter.data = 0.3 * noise
        else:
            parameter.data = (1.0 if "embed" in name else 0.2) * noise


def logits_of(folder: Path, tokens: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def make_tiny(name: str, seed: int) -> None:
    options, dtype = MODELS[name]
    config = {**SIZES, **options, "hidden_act": "silu", "torch_dtype": dtype}
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(config)))
    randomize(model, torch.Generator().manual_seed(seed))
    model.to(getattr(torch, dtype)).save_pretrained(
        folder, max_shard_size="30KB" if dtype == "bfloat16" else "1GB"
    )
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
    (folder / "generation_config.json").unlink(missing_ok=True)
    # Our spelling of the config, not that which transformers saves; the bfloat16 one keeps that.
    if dtype == "float32":
        (folder / "config.json").write_text(
            json.dumps({**config, "architectures": [type(model).__name__]}, indent=1) + "\n"
        )
    tokens = np.random.default_rng(seed).integers(0, config["vocab_size"], (2, 24)).astype(np.int32)
    logits = logits_of(folder, tokens)
    more = {}
    if config["model_type"] == "phi3":
        more["short"] = logits_of(folder, tokens[:, :SHORT])
    np.savez_compressed(folder / "logits.npz", tokens=tokens, logits=logits, **more)
    print(
        f"{name}: largest logit {np.abs(logits).max():.2f}, standard deviation {logits.std():.2f}"
    )


def make_real(name: str, shared: Path) -> None:
    """Logits of the first 32 tokens of a story, for at most 256 entries of the vocabulary spread
    over it.
    """
    folder = shared / "models" / name
    text = (shared / "text" / "tinystories_sample.txt").read_text()[:400]
    tokens = np.array([AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:32]], np.int32)
    logits = logits_of(folder, tokens)
    vocabulary = np.unique(np.linspace(0, logits.shape[-1] - 1, 256).astype(np.int32))
    np.savez_compressed(
        HERE / f"{name}.npz", tokens=tokens, logits=logits[..., vocabulary], vocabulary=vocabulary
    )
    print(f"{name}: largest logit {np.abs(logits).max():.2f}")


if __name__ == "__main__":
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    names = sys.argv[1:] or [*MODELS, *REAL]
    for seed, name in enumerate(MODELS):
        if name in names:
            make_tiny(name, seed)
    for name in REAL:
        if name in names:
            make_real(name, HERE.parents[1] / "data")
