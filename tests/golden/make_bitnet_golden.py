"""Makes tiny random checkpoints of Hugging Face's `bitnet`, and their logits by transformers.

    python -m tests.golden.make_bitnet_golden [FOLDER]

It needs torch, transformers 5 and accelerate, and writes to FOLDER (tests/golden). Inputs that lie
near the middle between two of the 8-bit levels could be rounded differently by another order of
summation; seeds are tried until no input of a linear is nearer than MARGIN.
"""

# pyright: reportMissingImports=false

import json
import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import bitnet

HERE = Path(__file__).parent
MARGIN = 1e-4  # of the levels, which are 1 apart
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
# Name -> (what config.json says besides, quantization_config).
KINDS = {
    "bitnet_llama": ({}, {"modules_to_not_convert": None}),
    "bitnet_norms": ({}, {"use_rms_norm": True, "rms_norm_eps": 1e-6}),
    "bitnet_falcon3": (
        {"head_dim": 16, "rope_theta": 1000042.0, "num_key_value_heads": 1},
        {"modules_to_not_convert": ["lm_head"]},
    ),
    "bitnet_2b4t": (
        {
            "model_type": "bitnet",
            "architectures": ["BitNetForCausalLM"],
            "hidden_act": "relu2",
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
        },
        {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    ),
    "bitnet_online": ({}, {"linear_class": "autobitlinear", "quantization_mode": "online"}),
}


def made(folder: Path, extra: dict, quantization: dict, seed: int) -> dict[str, torch.Tensor]:
    """Writes config.json and model.safetensors; returns the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LLAMA | extra
    torch.manual_seed(seed)
    dense = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{k: v for k, v in config.items() if k != "torch_dtype"})
    )
    tensors = {}
    for name, value in dense.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if value.ndim == 1:
            value = 1 + 0.2 * torch.randn(value.shape)
        elif not name.endswith("_proj.weight"):
            value = torch.randn(value.shape) / 4
        elif quantization.get("quantization_mode") == "online":
            value = torch.randn(value.shape) / 5
        else:
            stored = torch.rand(1) / 8 + 0.1
            divides = quantization.get("linear_class", "bitlinear") == "bitlinear"
            tensors[f"{name}_scale"] = 1 / stored if divides else stored
            if quantization.get("use_rms_norm"):
                gain = 1 + 0.2 * torch.randn(value.shape[1])
                tensors[name.replace(".weight", ".rms_norm.weight")] = gain
            value = bitnet.pack_weights(torch.randint(-1, 2, value.shape).float())
        tensors[name] = value.contiguous()
    config["quantization_config"] = {"quant_method": "bitnet", **quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def run(folder: Path, tokens: torch.Tensor) -> tuple[np.ndarray, float]:
    """(logits, the least distance of an input of a linear from the middle of two levels)."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    distances = []

    def watch(module, inputs) -> None:
        x = inputs[0]
        if module.rms_norm is not None:
            x = module.rms_norm(x)
        levels = x * (127 / x.abs().max(dim=-1, keepdim=True).values)
        distances.append(((levels - levels.floor()) - 0.5).abs().min().item())

    for module in model.modules():
        if isinstance(module, bitnet.BitLinear | bitnet.AutoBitLinear):
            module.register_forward_pre_hook(watch)
    with torch.no_grad():
        logits = model(tokens).logits
    return logits.numpy(), min(distances)


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for name, (extra, quantization) in KINDS.items():
        for seed in range(100):
            tokens = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(seed))
            made(out / name, extra, quantization, seed)
            logits, margin = run(out / name, tokens)
            if margin > MARGIN:
                break
        np.savez(out / name / "logits.npz", tokens=tokens.numpy().astype(np.int32), logits=logits)
        print(f"{name}: seed {seed}, nearest to a middle {margin:.1e}")


if __name__ == "__main__":
    main()
