"""Makes folders of atd's load in Hugging Face transformers (PyTorch), by being imported.

    import atd.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("out")

The matrices stay packed in memory: each product unpacks some rows of its matrix at a time, with
plain torch operations, on any device. Without this import transformers does not know the format: it
warns of an unknown quantization type, and fills the matrices with random numbers.

Needs torch and transformers: `pip install "atd-jax[hf]"`.
"""
# pyright: reportMissingImports=false

try:
    from atd.hf.quantizer import AtdConfig, AtdQuantizer
except ImportError as error:
    if (error.name or "").partition(".")[0] not in ("torch", "transformers"):
        raise
    raise ImportError(
        "atd.hf needs torch, and transformers 5.24 or newer: pip install 'atd-jax[hf]'",
        name=error.name,
    ) from error
