"""What config.json says layer by layer: attention windows, and which layers have a rope."""

from atd.models.config_reader import ConfigReader
from atd.models.rope_config import LAYER_TYPES

# Layers of which one sees all of the past and the others have a window, where no key says so.
_PERIODS = {"gemma2": 2, "gemma3_text": 6}
_WITHOUT_WINDOWS = ("llama", "bitnet", "granite", "olmo2")


def read_windows(
    family: str, layers: int, ropes: tuple[bool, ...], read: ConfigReader
) -> tuple[int, ...]:
    """Reads how many positions each layer attends to, its own included: int [layers]; 0: all.

    Args:
        family: the model_type.
        layers: their number.
        ropes: which of them have a rope.

    Raises:
        BadInput: a key is wrong, or does not fit the number of layers.
    """
    config = read.values
    if family in _WITHOUT_WINDOWS:
        return (0,) * layers
    if family in ("mistral", "phi3"):
        default = 4096 if family == "mistral" and "sliding_window" not in config else None
        unlimited = config.get("sliding_window", default) is None
        return (0 if unlimited else read.count("sliding_window", default),) * layers
    period, window = _PERIODS.get(family), 0
    if period or read.flag("use_sliding_window"):
        default = None if family == "smollm3" else 4096
        unlimited = config.get("sliding_window", default) is None
        window = 0 if unlimited else read.count("sliding_window", default)
    kinds = config.get("layer_types")
    if kinds is None and period:
        if family == "gemma3_text":
            period = read.count("sliding_window_pattern", period)
        kinds = [LAYER_TYPES[(i + 1) % period > 0] for i in range(layers)]
    if kinds is None and family == "smollm3":
        return tuple(0 if rope else window for rope in ropes)
    if kinds is None:
        first = config.get("max_window_layers", 28)
        if type(first) is not int:
            raise read.error(f"max_window_layers is {first!r}; expected an integer")
        return tuple(window if i >= first else 0 for i in range(layers))
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or not set(map(str, kinds)) <= set(LAYER_TYPES)
    ):
        raise read.error(
            f"layer_types is {kinds!r}; expected full_attention or sliding_attention for each of "
            f"{layers} layers"
        )
    if "sliding_attention" in kinds and not window:
        off = "" if period else "use_sliding_window is off or "
        raise read.error(f"layer_types has sliding_attention, but {off}sliding_window missing")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def read_ropes(family: str, layers: int, read: ConfigReader) -> tuple[bool, ...]:
    """Reads which layers have a rope: all, but in SmolLM3, by `no_rope_layers` (0: none) or every
    `no_rope_layer_interval`-th without.

    Raises:
        BadInput: a key is wrong, or does not fit the number of layers.
    """
    if family != "smollm3":
        return (True,) * layers
    given = read.values.get("no_rope_layers")
    if given is None:
        interval = read.count("no_rope_layer_interval", 4)
        return tuple((i + 1) % interval > 0 for i in range(layers))
    if not isinstance(given, list) or len(given) < layers or not all(v in (0, 1) for v in given):
        raise read.error(
            f"no_rope_layers is {given!r}; expected 0 (no rope) or 1 for each of {layers} layers"
        )
    return tuple(map(bool, given[:layers]))
