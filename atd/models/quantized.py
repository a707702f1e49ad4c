"""Refuses checkpoints that other methods have quantized, with the way out."""

from collections.abc import Mapping

from atd.checkpoint.reader import Checkpoint
from atd.errors import BadInput
from atd.models.binder import WEIGHT_DTYPES

# quant_method -> (what people call it, whether transformers can make dense weights of it).
METHODS: Mapping[str, tuple[str, bool]] = {
    "aqlm": ("AQLM", False),
    "auto-round": ("AutoRound", False),
    "awq": ("AWQ", False),
    "bitsandbytes": ("bitsandbytes", True),
    "compressed-tensors": ("compressed-tensors", False),
    "eetq": ("EETQ", False),
    "fbgemm_fp8": ("FBGEMM FP8", False),
    "fp8": ("FP8", True),
    "gptq": ("GPTQ", False),
    "higgs": ("HIGGS", True),
    "hqq": ("HQQ", True),
    "modelopt": ("ModelOpt", False),
    "mxfp4": ("MXFP4", True),
    "nvfp4": ("NVFP4", False),
    "quanto": ("Quanto", False),
    "quark": ("Quark", False),
    "spqr": ("SpQR", False),
    "torchao": ("torchao", False),
    "vptq": ("VPTQ", False),
}
# Endings of tensors of checkpoints whose config.json does not say what they are.
_ENDINGS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_scale_inv": "FP8",
}


def check_unquantized(checkpoint: Checkpoint, method: object) -> None:
    """Raises BadInput where weights are quantized by a method that atd does not read.

    Weights that are all dense pass, whatever config.json says of a former life.

    Args:
        checkpoint: its tensors.
        method: quant_method of its config.json, None where there is none.
    """
    found = [tensor for tensor in checkpoint.tensors.values() if tensor.dtype not in WEIGHT_DTYPES]
    for ending, name in _ENDINGS.items():
        coded = [tensor for tensor in checkpoint.tensors.values() if tensor.name.endswith(ending)]
        if coded and method is None:
            method, found = name, coded
            break
    if not found or method is None:
        return
    name, unpacks = METHODS.get(str(method), (str(method), False))
    told = "" if method == name else f"quant_method {method!r}, "
    way = "convert from the original checkpoint instead, in f32, f16 or bf16"
    if unpacks:
        way += (
            "; where there is none, transformers makes dense weights of this one: "
            "from_pretrained(...).dequantize(), then save_pretrained(FOLDER)"
        )
    dense = ", ".join(WEIGHT_DTYPES[:3])
    raise BadInput(
        f"{checkpoint.path}: a {name} checkpoint: its weights are quantized already "
        f"({told}tensor {found[0].name} is {found[0].dtype}, expected {dense}), "
        f"and rounding them again would add its error to theirs; {way}"
    )
