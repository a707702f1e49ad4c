"""Writes the model card of an output folder, README.md: what it is, its size, how to load it.

A card is made to be added to, so `verify` takes a changed one as it is; it counts as a change where
the folder is to be overwritten. Equal conversions have equal cards: of a model's name a card has
that of the hub alone.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from atd.checkpoint.folder import CARD
from atd.checkpoint.hub import hub_id, local
from atd.ir import Graph
from atd.models.structure import OTHER_WEIGHTS
from atd.runtime.compare import graph_size
from atd.weights import TernaryType, ternary_of

_LICENSE = ("license", "license_name", "license_link")

_ATD = """\
`MODEL` is this folder, or its name on the Hugging Face hub, `user/repo`.

Command line (`pip install atd-jax`):

```sh
atd generate MODEL --prompt "Once upon a time"
```

Python, with JAX:

```python
import atd
from atd.checkpoint.reader import open_tokenizer

tokenizer = open_tokenizer("MODEL")
new = atd.generate(atd.load("MODEL"), tokenizer.encode("Once upon a time"))
print(tokenizer.decode(new))
```
"""

_PACKED = """
transformers, with PyTorch (`pip install "atd-jax[hf]"`). The import is needed: without it
transformers does not know the format, and fills the linears with random numbers.

```python
import atd.hf
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("MODEL")
tokenizer = AutoTokenizer.from_pretrained("MODEL")
```
"""

_TORCH = """
transformers, with PyTorch (`pip install {packages}`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("MODEL")
tokenizer = AutoTokenizer.from_pretrained("MODEL")
```
"""

_BIT_TTT = """
[Bit-TTT-Engine](https://github.com/imonoonoko/Bit-TTT-Engine) takes the folder as it is:
`config.json`, where `arch` is `llama`, `model.safetensors` and `tokenizer.json`.
"""


def converted_card(source: Path, graph: Graph, passes: list[str]) -> str:
    """Returns the card of a folder of packed weights.

    Args:
        source: the model that was converted, a path or a name of the hub.
        graph: the converted model.
        passes: those of the recipe, as text.
    """
    head = _front_matter(source, "atd-jax", ["atd", "ternary", "quantized"])
    rows = {
        **_base(source),
        "recipe": ", ".join(f"`{step.partition('{')[0]}`" for step in passes)
        + "; with all options: `recipe.toml`",
        **_sizes(graph),
    }
    what = (
        "Weights that are sums of ternary matrices with scales, packed by atd at 1.6 bits per\n"
        "trit; `report.json` says which, and of how many trits."
    )
    use = _ATD if graph.config["model_type"] in OTHER_WEIGHTS else _ATD + _PACKED
    return _card(head, f"{_name(source, graph)}, ternary", what, rows, use)


def dense_card(source: Path, graph: Graph, dtype: str) -> str:
    """Returns the card of a folder of dense weights in Hugging Face's form.

    Args:
        source: the model that was exported, a path or a name of the hub.
        graph: its matrices as they are written.
        dtype: of the weights in the folder.
    """
    head = _front_matter(source, "transformers", ["atd"])
    weights = sum(math.prod(ref.type.shape) for _, ref in graph.weights())
    rows = {**_base(source), "weights": f"{weights:,}, {dtype}"}
    what = f"Weights that atd has written as dense {dtype}, dequantized where they were ternary."
    return _card(
        head,
        f"{_name(source, graph)}, dense",
        what,
        rows,
        _ATD + _TORCH.format(packages="torch transformers"),
    )


def bitnet_card(source: Path, graph: Graph) -> str:
    """Returns the card of a folder of Hugging Face's `bitnet`.

    Args:
        source: the model that was exported, a path or a name of the hub.
        graph: that model.
    """
    head = _front_matter(source, "transformers", ["atd", "ternary", "bitnet"])
    what = "Ternary weights that atd has written in the form of Hugging Face's `bitnet`."
    use = _ATD + _TORCH.format(packages="torch transformers accelerate")
    return _card(head, f"{_name(source, graph)}, bitnet", what, _planes(source, graph), use)


def bit_ttt_card(source: Path, graph: Graph) -> str:
    """Returns the card of a folder of Bit-TTT-Engine; `source` and `graph` as of `bitnet_card`."""
    head = _front_matter(source, "bit-ttt-engine", ["atd", "ternary", "bit-ttt"])
    what = "Ternary weights that atd has written in the form of Bit-TTT-Engine."
    rows, use = _planes(source, graph), _ATD + _BIT_TTT
    return _card(head, f"{_name(source, graph)}, Bit-TTT", what, rows, use)


def _planes(source: Path, graph: Graph) -> dict[str, str]:
    """Rows of a model whose trits take two bits each, with one scale per base and matrix."""
    types = [ref.type for _, ref in graph.weights()]
    planes = [(t, ternary) for t in types if isinstance(ternary := ternary_of(t), TernaryType)]
    trits = sum(math.prod(t.shape) * ternary.bases for t, ternary in planes)
    count = sum(math.prod(t.shape) for t, _ in planes)
    return {
        **_base(source),
        "weights": f"{sum(math.prod(t.shape) for t in types):,}",
        "bits per weight": f"{2 * trits / count:.2f}, of the decoder's linears",
    }


def _card(head: str, title: str, what: str, rows: Mapping[str, str], use: str) -> str:
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"{head}# {title}\n\n{what}\n\n| | |\n|---|---|\n{table}\n\n## Use\n\n{use}"


def _base(source: Path) -> dict[str, str]:
    """A row with the model that this one was made of, where that has a name of the hub."""
    name = hub_id(source)
    return {} if name is None else {"made of": f"`{name}`"}


def _name(source: Path, graph: Graph) -> str:
    """What the title calls the model: its name on the hub, or its architecture."""
    name = hub_id(source)
    return name.repo.partition("/")[2] if name else f"A {graph.config['model_type']} model"


def _sizes(graph: Graph) -> dict[str, str]:
    """Rows of weights, bits and bytes."""
    bits, size = graph_size(graph)
    weights = sum(math.prod(ref.type.shape) for _, ref in graph.weights())
    return {
        "weights": f"{weights:,}",
        "bits per weight": f"{bits:.2f}, of the decoder's linears with their scales",
        "size": f"{size / 1e6:,.1f} MB",
    }


def _front_matter(source: Path, library: str, tags: list[str]) -> str:
    """The metadata that the hub reads; strings as JSON, which is YAML too."""
    name = hub_id(source)
    values = {
        **({} if name is None else {"base_model": name.repo}),
        "library_name": library,
        "pipeline_tag": "text-generation",
        **_license(local(source)),
        "tags": tags,
    }
    return "\n".join(["---", *(f"{k}: {json.dumps(v)}" for k, v in values.items()), "---", "", ""])


def _license(source: Path) -> dict[str, str]:
    """What the card of the source says of its license; a link to a file beside it says nothing
    here.
    """
    if not (source / CARD).is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        data = metadata_load(source / CARD)
    except Exception:  # of the library and of YAML's: no card that the hub could read either
        return {}
    found = {} if data is None else {key: data.get(key) for key in _LICENSE}
    if not str(found.get("license_link", "")).startswith("https://"):
        found.pop("license_link", None)
    return {key: value for key, value in found.items() if isinstance(value, str)}
