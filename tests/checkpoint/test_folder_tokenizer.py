"""Tokenizers of Hugging Face folders: their files, special tokens, chat templates, bad input."""

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
    ("name", "data"),
    [("tokenizer.json", b'{"model": 1}'), ("tokenizer_config.json", b"{"), ("config.json", b"[]")],
)
def test_a_damaged_file_is_named(tmp_path, stories260k, name, data):
    path = folder(tmp_path / "m", stories260k)
    (path / name).write_bytes(data)
    with pytest.raises(BadInput, match=name):
        open_tokenizer(path)
