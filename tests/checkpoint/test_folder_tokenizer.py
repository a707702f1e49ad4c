"""Tokenizers of Hugging Face folders: their files, special tokens, chat templates, bad input."""

import json

import pytest

from atd.checkpoint.reader import open_tokenizer
from atd.checkpoint.tokenizer import FILES
from atd.errors import BadInput
from tests.checkpoint.tokenizer_files import folder


def test_a_folder_keeps_its_files_byte_for_byte(stories260k):
    tokenizer = open_tokenizer(stories260k)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocabulary_size, tokenizer.adds_bos) == (
        1,
        (2,),
        512,
        True,
    )
    stored = tokenizer.files()
    assert set(stored) == {"tokenizer.json", "tokenizer_config.json"} <= set(FILES)
    assert all(data == (stories260k / name).read_bytes() for name, data in stored.items())
    text = "Once upon a time, there was a café.\n  The end"
    assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text


def test_eos_ids_come_from_generation_config_config_and_tokenizer(tmp_path, stories260k):
    configs = {
        "generation_config": {"eos_token_id": [7, 9]},
        "config": {"bos_token_id": 5, "eos_token_id": 9},
        "tokenizer_config": {"eos_token": {"content": "</s>"}, "add_bos_token": False},
    }
    tokenizer = open_tokenizer(folder(tmp_path / "m", stories260k, **configs))
    assert tokenizer.eos_ids == (7, 9, 2)
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (5, False)


def test_chat_template_file_wins_and_sees_what_transformers_gives(tmp_path, stories260k):
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "from the config"}
    path = folder(tmp_path / "m", stories260k, tokenizer_config=config)
    (path / "chat_template.jinja").write_text(
        "{{ bos_token }}\n"
        "{% for m in messages %}\n"
        "    {% if m.role not in ['user', 'assistant'] %}\n"
        "        {{ raise_exception('no ' + m.role) }}\n"
        "    {% endif %}\n"
        "{{ m | tojson }}{{ eos_token }}\n"
        "    {% if not loop.last %}{% continue %}{% endif %}\n"
        "{% endfor %}\n"
        "{{ strftime_now('%Y') | length }}{{ tools is none }}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    tokenizer = open_tokenizer(path)
    expected = '<s>\n{"role": "user", "content": "<é>"}</s>\n4True>'
    assert tokenizer.apply_chat([{"role": "user", "content": "<é>"}]) == expected
    assert (
        tokenizer.apply_chat([{"role": "user", "content": "<é>"}], add_generation_prompt=False)
        == expected[:-1]
    )
    with pytest.raises(BadInput, match="refuses this conversation: no system"):
        tokenizer.apply_chat([{"role": "system", "content": "x"}])


def test_tokens_of_the_config_are_the_tokenizers(tmp_path, stories260k):
    """Those that only added_tokens_decoder or added_tokens.json has, as transformers reads them."""
    config = {
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True},
            "512": {"content": "<|im_end|>", "special": True},
            "513": {"content": "<tool>", "special": False},
        },
    }
    path = folder(tmp_path / "m", stories260k, tokenizer_config=config)
    tokenizer = open_tokenizer(path)
    assert tokenizer.eos_ids == (512,)
    ids = tokenizer.encode("Once<tool><|im_end|>").tolist()
    assert ids[-2:] == [513, 512]
    assert tokenizer.decode(ids) == "Once<tool>"
    added = {"<|im_end|>": 512, "<tool>": 513}
    eos = {"eos_token": {"content": "<|im_end|>"}}
    legacy = folder(tmp_path / "l", stories260k, added_tokens=added, special_tokens_map=eos)
    tokenizer = open_tokenizer(legacy)
    assert tokenizer.eos_ids == (512,)
    assert tokenizer.encode("Once<tool><|im_end|>").tolist() == ids
    assert tokenizer.decode(ids) == "Once<tool>"
    assert set(tokenizer.files()) == {
        "tokenizer.json",
        "added_tokens.json",
        "special_tokens_map.json",
    }


def test_a_special_token_of_the_vocabulary_stays_whole(tmp_path, stories260k):
    words = json.loads((stories260k / "tokenizer.json").read_text())
    (path := tmp_path / "m").mkdir()
    (path / "tokenizer.json").write_text(json.dumps(words | {"added_tokens": []}))
    (path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = open_tokenizer(path)
    assert tokenizer.encode("a</s>").tolist()[-1] == 2
    assert tokenizer.decode([2]) == ""


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"added_tokens": {"<x>": 600}}, "has the id 600, but with tokenizer.json it is 512"),
        ({"added_tokens": {"\ud800": 512}}, "surrogates not allowed"),
        ({"added_tokens": {"<x>": "1"}}, "the id of '<x>' is '1'"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "added_tokens_decoder is []"),
        ({"tokenizer_config": {"added_tokens_decoder": {"5": "x"}}}, "'x' is no token"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}},
            "is no token",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"5": {"content": "x", "special": 1}}}},
            "is no token",
        ),
    ],
)
def test_tokens_that_are_none_are_refused(tmp_path, stories260k, files, words):
    with pytest.raises(BadInput) as caught:
        open_tokenizer(folder(tmp_path / "m", stories260k, **files))
    assert words in str(caught.value)


@pytest.mark.parametrize("i", [-1, 1 << 32, 1 << 64, True, 1.0, "2"])
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
def test_ids_that_no_token_can_have_are_refused(tmp_path, stories260k, key, i):
    path = folder(tmp_path / "m", stories260k, generation_config={}, config={key: i})
    with pytest.raises(BadInput, match=f"{key} is {i!r}; expected a token id"):
        open_tokenizer(path)


def test_chat_templates_by_name_and_for_training(tmp_path, stories260k):
    learned = "{% set a = 'x' %}{% generation %}{% set a = 'y' %}{{ a }}{% endgeneration %}{{ a }}"
    named = {"tool_use": "tools", "default": learned}
    path = folder(tmp_path / "m", stories260k, tokenizer_config={"chat_template": named})
    assert open_tokenizer(path).apply_chat([]) == "yx"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in 3 %}{% endfor %}", "its chat template fails: TypeError: 'int' object is not"),
        ("{{ 1 // 0 }}", "its chat template fails: ZeroDivisionError"),
        ("a\n{% if %}", "its chat template is no valid Jinja: line 2"),
    ],
)
def test_a_chat_template_that_fails_is_told(tmp_path, stories260k, template, words):
    path = folder(tmp_path / "m", stories260k, tokenizer_config={"chat_template": template})
    with pytest.raises(BadInput) as caught:
        open_tokenizer(path).apply_chat([])
    assert words in str(caught.value)


def test_text_that_is_no_unicode_is_refused(stories260k):
    with pytest.raises(BadInput, match="not valid Unicode at character 1"):
        open_tokenizer(stories260k).encode("a\udcff")


def test_a_chat_template_is_kept_in_its_sandbox(tmp_path, stories260k):
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}{{ messages.append(1) }}"
    path = folder(
        tmp_path / "m",
        stories260k,
        tokenizer_config={"chat_template": [{"name": "default", "template": template}]},
    )
    with pytest.raises(BadInput, match="chat template"):
        open_tokenizer(path).apply_chat([])


# --- bad input ---


def test_what_is_missing_is_said(tmp_path, stories260k):
    with pytest.raises(BadInput, match="no such file or folder"):
        open_tokenizer(tmp_path / "absent")
    with pytest.raises(BadInput, match=r"has no tokenizer\.json; copy it"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"only tokenizer\.model: AutoTokenizer"):
        open_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(BadInput, match="neither"):
        open_tokenizer(tmp_path / "text.txt")
    with pytest.raises(BadInput, match="no chat template"):
        open_tokenizer(stories260k).apply_chat([{"role": "user", "content": "Hi"}])
    without = open_tokenizer(folder(tmp_path / "m", stories260k))
    assert without.bos_id is None
    with pytest.raises(BadInput, match="no BOS token"):
        without.encode("Hi", bos=True)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("post_processor", "special_tokens", {}), ("model", "continuing_subword_prefix", "BPE")],
)
def test_a_panic_of_the_library_is_told(tmp_path, stories260k, part, key, value):
    path = folder(tmp_path / "m", stories260k)
    content = json.loads((path / "tokenizer.json").read_text())
    content[part][key] = value
    (path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"tokenizer\.json: the tokenizers library cannot"):
        open_tokenizer(path)


@pytest.mark.parametrize(
    ("name", "data"),
    [("tokenizer.json", b'{"model": 1}'), ("tokenizer_config.json", b"{"), ("config.json", b"[]")],
)
def test_a_damaged_file_is_named(tmp_path, stories260k, name, data):
    path = folder(tmp_path / "m", stories260k)
    (path / name).write_bytes(data)
    with pytest.raises(BadInput, match=name):
        open_tokenizer(path)
